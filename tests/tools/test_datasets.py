"""Each public data set's rows, in the shape that the data set has, become the right records or none."""

import base64
import json
import os
import pickle
import zlib
from itertools import islice
from pathlib import Path

import datasets
import pytest
from problem_sets.catalog import HUB, Options, candidates, names
from problem_sets.programs import pickled_text
from problem_sets.record import text_id

from exprl_megatron.config.problems import FieldNames
from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.records import parse_problem

ROWS = Path(__file__).parents[1] / "data" / "rows"
SUM_TESTS = [
    {"input": "1 2\n", "output": "3\n"},
    {"input": "5 5\n", "output": "10\n"},
    {"input": "0 0\n", "output": "0\n"},
]
FALL = {
    "id": "sciknoweval-oe-97eede292fd9",
    "problem": "A ball is dropped from height h. Find its speed at the ground.",
    "domain": "science",
    "source": "sciknoweval-oe",
}
FORCE = {
    "id": "sciknoweval-mcq-1f0f5eef1167",
    "problem": "A mass of 2 kg is accelerated at 3 m/s^2. Find the force.",
    "answer": "B",
    "domain": "multiple-choice",
    "choices": ["5 N", "6 N", "8 N", "9 N"],
    "source": "sciknoweval-mcq",
}


def read(name: str, rows: str | None = None, **settings) -> list[dict | None]:
    return list(candidates(name, Options(**settings), copy=ROWS / f"{rows or name}.json"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "int",
            [
                {
                    "id": "int-681af2b0765b",
                    "problem": "Find all primes $p$ such that $p+2$ and $p+4$ are prime.",
                    "reference": "One of $p, p+2, p+4$ is divisible by 3, so $p=3$.",
                    "answer": "3",
                    "domain": "math",
                    "source": "int",
                },
                None,
            ],
        ),
        (
            "pope",
            [
                {
                    "id": "pope-8c5d464e65ce",
                    "problem": r"Compute $1+2+\dots+100$.",
                    "reference": r"Pair the terms: $50\cdot 101=5050$. The answer is $\boxed{5050}$.",
                    "answer": "5050",
                    "domain": "math",
                    "source": "pope",
                },
                None,
            ],
        ),
        (
            "aime-2025",
            [
                {
                    "id": "aime-2025-1",
                    "problem": "Find the sum of the digits of $7^{12}$.",
                    "answer": "49",
                    "domain": "math",
                    "source": "aime-2025",
                }
            ],
        ),
        (
            "aime-2026",
            [
                {
                    "id": "aime-2026-12",
                    "problem": "Find the remainder.",
                    "answer": "204",
                    "domain": "math",
                    "source": "aime-2026",
                }
            ],
        ),
        (
            "hmmt-nov-2025",
            [
                {
                    "id": "hmmt-nov-2025-3",
                    "problem": "Compute the ratio.",
                    "answer": r"\frac{3}{4}",
                    "domain": "math",
                    "source": "hmmt-nov-2025",
                }
            ],
        ),
        (
            "imo-answerbench",
            [
                {
                    "id": "imo-bench-algebra-001",
                    "problem": r"Find all $N$ such that the sum is $\frac{N^3-N^2+2}{4}$.",
                    "answer": "3",
                    "domain": "math",
                    "source": "imo-answerbench",
                }
            ],
        ),
        (
            "sciknoweval-oe",
            [
                FALL | {"reference": "Energy is conserved: mgh = mv^2/2, hence v = sqrt(2gh)."},
                *[None] * 5,
            ],
        ),
        ("sciknoweval-oe-gemini", [FALL | {"reference": r"By energy conservation the speed is $\sqrt{2gh}$."}, None]),
        ("sciknoweval-mcq-gemini", [FORCE | {"reference": "F = ma = 6 N.\nFinal Answer: B"}, None]),
        (
            "olympiadbench-physics",
            [
                {
                    "id": "olympiadbench-physics-1050",
                    "problem": "A pendulum of length $l=1$ m hangs on Earth.\n\nFind the period of the pendulum.",
                    "reference": "The restoring torque is $-mgl\\theta$.\n\nHence $T=2\\pi\\sqrt{l/g}=2.0$ s.",
                    "answer": "2.0 s",
                    "domain": "science",
                    "source": "olympiadbench-physics",
                },
                {
                    "id": "olympiadbench-physics-1051",
                    "problem": "Find the period of the pendulum.",
                    "reference": "The restoring torque is $-mgl\\theta$.\n\nHence $T=2\\pi\\sqrt{l/g}=2.0$ s.",
                    "answer": "x_1=1, x_2=2",
                    "domain": "science",
                    "source": "olympiadbench-physics",
                },
                None,
                None,
            ],
        ),
    ],
)
def test_rows_become_records_and_those_to_be_filtered_none(name, expected):
    assert read(name) == expected


def test_sciknoweval_choice_questions_with_the_same_words_are_distinguished_by_their_choices():
    first, *filtered, last = read("sciknoweval-mcq")
    assert first == FORCE
    assert filtered == [None] * 4
    assert (last["problem"], last["choices"][0]) == (FORCE["problem"], "4 N")
    assert last["id"] != first["id"]


def test_dapo_problems_come_out_of_their_frame():
    plain, framed, again = read("dapo-math")
    assert plain["problem"] == "In triangle $ABC$, find $a+b+c$.\n\nThe sides are integers."
    assert plain == again
    assert framed == {
        "id": "dapo-math-b426d104-244d-4831-a2c4-cd756b61700a",
        "problem": "How many?\n\nCount them.",
        "answer": "6",
        "domain": "math",
        "source": "dapo-math",
    }


def test_openmath_keeps_solutions_after_the_thinking_that_box_the_expected_answer():
    kept, *filtered, again = read("openmath")
    assert kept["reference"] == "The product is 42.\n\n\\[\\boxed{42}\\]"
    assert (kept["problem"], kept["answer"]) == ("What is $6\\cdot 7$?", "42")
    assert kept == again
    assert filtered == [None] * 4


def test_gpqa_choices_hang_on_the_seed_and_the_record_alone():
    (record,) = read("gpqa-diamond")
    assert record["id"] == "gpqa-recAAAAAAAAAAAAAA"
    assert record["reference"] == "The charged weak current is mediated by the W."
    assert sorted(record["choices"]) == ["The W boson", "The gluon", "The graviton", "The photon"]
    orders = set()
    for seed in range(20):
        (shuffled,) = read("gpqa-diamond", seed=seed)
        assert shuffled["choices"]["ABCD".index(shuffled["answer"])] == "The W boson"
        orders.add((shuffled["answer"], *shuffled["choices"]))
    assert {order[0] for order in orders} == set("ABCD")
    assert len(orders) > 10
    assert read("gpqa-diamond", seed=3) == read("gpqa-diamond", seed=3)


def test_livecodebench_tests_are_decoded_public_ones_first():
    reads, completes = read("livecodebench-v5", "livecodebench")
    assert reads["id"] == "livecodebench-1873_A"
    assert reads["problem"].startswith("Given two integers, print their sum.\n\nWrite a Python program that reads")
    assert reads["tests"] == SUM_TESTS
    assert "reference" not in reads
    assert completes["problem"].endswith("```python\nclass Solution:\n    def add(self, a: int, b: int) -> int:\n```")
    assert completes["tests"] == [
        {"input": "1\n2", "output": "3", "function": "add"},
        {"input": "4\n5", "output": "9", "function": "add"},
    ]
    assert read("livecodebench-v6", "livecodebench", max_tests=2)[0]["tests"] == SUM_TESTS[:2]


def solved(solutions: Path) -> list[dict | None]:
    rows = ROWS / "livecodebench.json"
    return list(candidates("livecodebench-v6-gemini", Options(), copy=rows, solutions=solutions))


def test_livecodebench_takes_the_solutions_that_pass_all_tests(tmp_path):
    kept, filtered = solved(ROWS / "livecodebench-solutions.json")
    assert kept["reference"] == "Read both and add.\n```python\nprint(sum(map(int, input().split())))\n```"
    assert kept["tests"] == SUM_TESTS
    assert filtered is None
    others = json.loads((ROWS / "livecodebench-solutions.json").read_text())
    others[0]["extra_info"]["question"] = "Question: Something else."
    (tmp_path / "others.json").write_text(json.dumps(others))
    with pytest.raises(UserError, match="the index 0 is not to LiveCodeBench's question 1873_A"):
        solved(tmp_path / "others.json")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def packed(content: object, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content, protocol))).decode()


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickled_string_is_read_whatever_wrote_it(protocol):
    text = '[{"input": "ä\\n\\u2028", "output": "' + "x" * 300 + '"}]'
    assert pickled_text(pickle.dumps(text, protocol)) == text


@pytest.mark.parametrize(
    ("private_tests", "sentence"),
    [
        (packed(Harmful()), "hold STACK_GLOBAL and not just a string"),
        (packed(Harmful(), protocol=0), "hold GLOBAL and not just a string"),
        (packed(["[]"]), "hold EMPTY_LIST and not just a string"),
        (packed(b"[]"), "hold SHORT_BINBYTES and not just a string"),
        (base64.b64encode(zlib.compress(b"\x80\x04\x8c\x02[]")).decode(), "are not a pickled string"),
        (base64.b64encode(b"[]").decode(), "neither JSON nor packed as expected"),
        ("{", "neither JSON nor packed as expected"),
    ],
    ids=["a call", "a call of old", "a list", "bytes", "cut off", "not compressed", "not base64"],
)
def test_private_tests_that_are_not_a_pickled_string_are_not_unpickled(tmp_path, monkeypatch, private_tests, sentence):
    monkeypatch.chdir(tmp_path)
    row = json.loads((ROWS / "livecodebench.json").read_text())[0] | {"private_test_cases": private_tests}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=sentence):
        list(candidates("livecodebench-v5", Options(), copy=tmp_path / "rows.json"))
    assert not (tmp_path / "harmed").exists()


def test_tests_that_unpack_to_more_than_the_bound_are_refused(monkeypatch):
    monkeypatch.setattr("problem_sets.programs.LARGEST_TESTS", 10)
    with pytest.raises(UserError, match="unpack to more than 10 bytes"):
        read("livecodebench-v5", "livecodebench")


@pytest.mark.parametrize("name", sorted(HUB))
def test_every_data_set_of_the_hub_gives_sound_problems(name):
    rows = "livecodebench" if name.startswith("livecodebench") else name
    solutions = ROWS / "livecodebench-solutions.json"
    found = list(candidates(name, Options(), copy=ROWS / f"{rows}.json", solutions=solutions))
    problems = [parse_problem(record, FieldNames()) for record in found if record is not None]
    assert problems and all(isinstance(problem, Problem) for problem in problems)
    assert all(problem.source for problem in problems)


@pytest.mark.parametrize(("name", "size"), [("champ", 270), ("gsm8k-test", 100), ("gsm-symbolic", 300)])
def test_every_packaged_data_set_gives_sound_problems(name, size):
    found = list(candidates(name, Options(variants=3)))
    assert all(isinstance(parse_problem(record, FieldNames()), Problem) for record in found)
    assert all(record["reference"] and record["answer"] for record in found)
    assert len({record["id"] for record in found}) == len({record["problem"] for record in found}) == size


def test_champ_has_the_human_steps_as_references():
    record = next(record for record in candidates("champ", Options()) if record["id"] == "champ-Inequality_3")
    assert record["answer"] == "1/3"
    assert record["reference"].count("\n") >= 2
    assert record["reference"].splitlines()[0].startswith("Since a, b, c>0, we have the two sequences")


def test_gsm_symbolic_variants_hang_on_the_seed_and_grow_by_appending():
    few = list(islice(candidates("gsm-symbolic", Options(variants=2, seed=1)), 6))
    many = list(islice(candidates("gsm-symbolic", Options(variants=4, seed=1)), 12))
    other = list(islice(candidates("gsm-symbolic", Options(variants=2, seed=2)), 6))
    assert few == [record for record in many if record["id"].endswith(("-0", "-1"))]
    assert not {record["problem"] for record in few} & {record["problem"] for record in other}
    assert all(record["reference"].endswith(f"#### {record['answer']}") for record in many)
    assert not any("<<" in record["reference"] for record in many)


def test_rows_come_alike_from_json_json_lines_parquet_and_a_copied_directory(tmp_path):
    rows = json.loads((ROWS / "int.json").read_text())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "copy").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "copy" / "train-00000-of-00001.parquet"))
    for copy in ("rows.jsonl", "copy", "copy/train-00000-of-00001.parquet"):
        assert list(candidates("int", Options(), copy=tmp_path / copy)) == read("int")


def test_a_copied_directory_of_json_lines_is_read_file_by_file(tmp_path):
    first, second = json.loads((ROWS / "livecodebench.json").read_text())
    for number, row in {"": first, "2": second, "3": None, "4": None, "5": None}.items():
        (tmp_path / f"test{number}.jsonl").write_text("" if row is None else json.dumps(row) + "\n")
    assert list(candidates("livecodebench-v5", Options(), copy=tmp_path)) == read("livecodebench-v5", "livecodebench")


def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"The data set MathArena/aime_2025 cannot be read .* or give a copy of it"):
        next(candidates("aime-2025", Options()))
    with pytest.raises(UserError, match="There is no copy of the data set at nowhere"):
        next(candidates("int", Options(), copy=Path("nowhere")))
    with pytest.raises(UserError, match="comes from an installed package; leave --split and --from out"):
        next(candidates("champ", Options(), split="test"))
    with pytest.raises(UserError, match="is read file by file here and has no splits"):
        next(candidates("livecodebench-v5", Options(), split="test", copy=tmp_path))


def test_rows_of_another_form_are_named():
    with pytest.raises(UserError, match=r"Row 0 of int is not of the form .* \(KeyError\('solution'\)\); it has the"):
        list(candidates("int", Options(), copy=ROWS / "pope.json"))


def test_ids_made_of_the_text_do_not_hang_on_white_space():
    assert text_id("x", "a  b\nc") == text_id("x", " a b c ")
    assert text_id("x", "a", "b") != text_id("x", "a b")
    # From `printf 'a b c' | sha256sum`.
    assert text_id("x", "a b c") == "x-0e9f64031fcb"


def test_every_data_set_says_what_it_is():
    assert all(about and not about.endswith(".") for about in names().values())
