"""Problems are read from every kind of source, and each fault of a source gets its sentence."""

import json

import datasets
import pytest

from exprl_megatron.config.problems import FieldNames, ProblemsConfig
from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import CodeTest
from exprl_megatron.problems.sources import load_problems, load_records


def _record(number, **changes):
    return {
        "id": f"p{number}",
        "problem": f"What is {number} + 1?",
        "reference": f"One more than {number}.",
        "answer": str(number + 1),
    } | changes


def _lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def _load(source, **config):
    return load_problems(ProblemsConfig(source=str(source), **config))


def _faults(source, **config):
    with pytest.raises(UserError) as caught:
        _load(source, **config)
    return str(caught.value).splitlines()


def test_json_lines_become_problems(tmp_path):
    odd = _record(2, problem="a line\u2028separator and {braces}")
    problems = _load(_lines(tmp_path / "a.jsonl", [_record(1), "", odd]))
    assert [p.id for p in problems] == ["p1", "p2"]
    assert problems[1].text == "a line\u2028separator and {braces}"
    assert problems[0].reference.for_judge() == "One more than 1."
    assert problems[0].answer == "2"


def test_numbers_are_taken_as_ids_and_answers(tmp_path):
    records = [_record(1, id=7, answer=2), _record(2, answer="x^2"), _record(3, answer=0.5)]
    problems = _load(_lines(tmp_path / "a.jsonl", records))
    assert [(p.id, p.answer) for p in problems] == [("7", "2"), ("p2", "x^2"), ("p3", "0.5")]


def test_parquet_and_own_field_names(tmp_path):
    records = [{"key": f"p{i}", "question": "q", "solution": "s", "short": "1"} for i in range(3)]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    fields = FieldNames(id="key", problem="question", reference="solution", answer="short")
    problems = _load(tmp_path / "a.parquet", fields=fields, limit=2)
    assert [p.id for p in problems] == ["p0", "p1"]
    assert problems[0].reference.for_judge() == "s"


def test_a_record_needs_nothing_but_an_id_and_a_problem(tmp_path):
    bare = {"id": "p1", "problem": "Why?"}
    nulls = {"id": "p2", "problem": "Why?"} | dict.fromkeys(
        ("reference", "answer", "domain", "choices", "tests", "source")
    )
    expected = (None, None, "math", (), (), "")
    for problem in _load(_lines(tmp_path / "a.jsonl", [bare, nulls])):
        assert (
            problem.reference,
            problem.answer,
            problem.domain,
            problem.choices,
            problem.tests,
            problem.source,
        ) == expected


def test_the_full_record_comes_alike_from_json_lines_and_parquet(tmp_path):
    tests = [{"input": "1 2\n", "output": "3\n", "function": None}, {"input": "1\n2", "output": "3", "function": "add"}]
    records = [
        _record(1, domain="multiple-choice", choices=["red", "blue"], answer="B", tests=None, source="colours"),
        _record(2, domain="code", choices=None, answer=None, tests=tests, source="sums"),
    ]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    problems = _load(_lines(tmp_path / "a.jsonl", records))
    assert problems == _load(tmp_path / "a.parquet")
    assert problems[0].statement == "What is 1 + 1?\nA. red\nB. blue"
    assert (problems[0].answer, problems[0].source) == ("B", "colours")
    assert problems[1].tests == (CodeTest("1 2\n", "3\n"), CodeTest("1\n2", "3", "add"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"domain": "physics"}, "the field 'domain' is 'physics'; use one of math, multiple-choice, science, code, or"),
        ({"choices": "A or B"}, "the field 'choices' is 'A or B'; write a list of texts"),
        ({"choices": ["A", 2]}, "the field 'choices' is ['A', 2]; write a list of texts"),
        ({"choices": ["red", "blue"]}, "there are choices, but the domain is math; set the domain to multiple-choice."),
        ({"domain": "multiple-choice"}, "the domain is multiple-choice, but the choices are 0; give at least two."),
        (
            {"domain": "multiple-choice", "choices": ["red", "blue"], "answer": "C"},
            "the answer is 'C', but the choices are A to B; write one of these letters.",
        ),
        (
            {"domain": "multiple-choice", "choices": ["red", "blue"], "answer": "blue"},
            "the answer is 'blue', but the choices are A to B",
        ),
        ({"domain": "multiple-choice", "choices": ["x"] * 27, "answer": "A"}, "has 27 choices, more than there are"),
        ({"tests": "1 -> 2"}, "the field 'tests' is '1 -> 2'; write a list of tests."),
        ({"tests": [["1", "2"]]}, "the field 'tests': test 1 is ['1', '2']; write {\"input\": ..., \"output\": ...}."),
        ({"tests": [{"input": "1", "output": 2}]}, "the field 'tests': test 1 has no text 'output'; add it."),
        (
            {"tests": [{"input": "1", "output": "2"}, {"input": "1", "outptu": "2"}]},
            "the field 'tests': test 2 has the unknown key 'outptu'",
        ),
        (
            {"tests": [{"input": "1", "output": "2", "function": "a b"}]},
            "the field 'tests': test 1 names the function 'a b'",
        ),
        (
            {"tests": [{"input": "1", "output": "2"}]},
            "there are tests, but the domain is math; set the domain to code.",
        ),
        ({"domain": "code", "reference": None}, "the domain is code, but there are neither tests nor a reference"),
        ({"answer": ""}, "the field 'answer' is empty; fill it or leave the field out."),
    ],
)
def test_what_contradicts_itself_is_named(tmp_path, changes, sentence):
    (fault,) = _faults(_lines(tmp_path / "a.jsonl", [_record(1, **changes)]))
    assert sentence in fault


def test_records_are_given_as_they_were_read(tmp_path):
    record = _record(1, level="hard", extra=[1, 2])
    ((problem, read),) = load_records(ProblemsConfig(source=str(_lines(tmp_path / "a.jsonl", [record]))))
    assert (problem.id, read) == ("p1", record)


def test_a_directory_is_its_files_in_order_without_other_splits(tmp_path):
    _lines(tmp_path / "b.jsonl", [_record(2)])
    _lines(tmp_path / "test.jsonl", [_record(9)])
    _lines(tmp_path / "more" / "train-00000.jsonl", [_record(3)])
    datasets.Dataset.from_list([_record(1)]).to_parquet(str(tmp_path / "a.parquet"))
    assert [p.id for p in _load(tmp_path)] == ["p1", "p2", "p3"]
    assert [p.id for p in _load(tmp_path, split="test")] == ["p1", "p2", "p9"]


def test_a_bad_line_is_named_by_its_number(tmp_path):
    path = _lines(tmp_path / "a.jsonl", [_record(1), "", "{'id': 1}", "[1]"])
    faults = _faults(path)
    assert len(faults) == 2
    assert faults[0].startswith(f"{path} line 3: this is not JSON")
    assert faults[1].startswith(f"{path} line 4: this is a JSON list, not an object")


def test_a_missing_an_empty_and_an_odd_field_are_named_with_their_line(tmp_path):
    missing = _record(1)
    del missing["problem"]
    path = _lines(tmp_path / "a.jsonl", [missing, _record(2, problem="  "), _record(3, answer=["4"])])
    faults = _faults(path)
    assert "line 1: the field 'problem' is missing (the record has: id, reference, answer)" in faults[0]
    assert "line 2: the field 'problem' is empty" in faults[1]
    assert "line 3: the field 'answer' is a list, not text" in faults[2]


def test_an_id_given_twice_is_named_with_both_places(tmp_path):
    path = _lines(tmp_path / "a.jsonl", [_record(1), _record(2), _record(1)])
    (fault,) = _faults(path)
    assert f"{path} line 3: the id 'p1' also occurs at {path} line 1" in fault


def test_many_faults_are_counted_after_the_first_ten(tmp_path):
    faults = _faults(_lines(tmp_path / "a.jsonl", [_record(n, domain=f"d{n}") for n in range(25)]))
    assert len(faults) == 11
    assert faults[-1] == "... and 15 more faults."


def test_a_fault_of_all_records_is_one_sentence_with_its_remedy(tmp_path):
    records = [{"uid": n, "question": "1 + 1?", "solution": "It is 2.", "final": "2"} for n in range(20)]
    path = _lines(tmp_path / "a.jsonl", records)
    known = "(the record has: uid, question, solution, final)"
    assert _faults(path) == [
        f"{path}: in all 20 records the field 'id' is missing {known}; set problems.fields.id=uid.",
        f"{path}: in all 20 records the field 'problem' is missing {known}; set problems.fields.problem=question.",
    ]


def test_a_fault_of_some_records_has_their_number_and_the_first_place(tmp_path):
    path = _lines(tmp_path / "a.jsonl", [_record(1), _record(2, problem=" "), _record(3), _record(4, problem="")])
    (fault,) = _faults(path)
    assert fault.startswith(f"{path}: in 2 of 4 records, the first at line 2, the field 'problem' is empty;")


@pytest.mark.parametrize("records", [[], ["", "  "]])
def test_an_empty_file_is_refused(tmp_path, records):
    (fault,) = _faults(_lines(tmp_path / "a.jsonl", records))
    assert "is empty" in fault


def test_a_missing_file_an_unknown_kind_and_an_empty_directory_are_refused(tmp_path):
    assert "There is no problem file" in _faults(tmp_path / "nowhere.jsonl")[0]
    assert "There is no problem file" in _faults("data/sub/dir/train")[0]
    (tmp_path / "a.csv").write_text("id\n")
    assert "neither .jsonl nor .parquet" in _faults(tmp_path / "a.csv")[0]
    assert "holds no .jsonl" in _faults(tmp_path)[0]
    _lines(tmp_path / "test.jsonl", [_record(1)])
    assert "no file for the split 'train'" in _faults(tmp_path)[0]


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    (fault,) = _faults(tmp_path / "a.parquet")
    assert "cannot be read as Parquet" in fault
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x80")
    (fault,) = _faults(tmp_path / "a.jsonl")
    assert "is not UTF-8 text" in fault


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (fault,) = _faults("nobody-here/no-such-set")
    assert "nobody-here/no-such-set is not a local file and cannot be read from the Hugging Face hub" in fault


def test_a_text_that_no_model_can_read_is_refused_before_it_is_tokenized(tmp_path):
    record = {"id": "p", "problem": "word " * 1_000_000, "answer": "1"}
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(
        UserError, match="line 1: the field 'problem' has 5000000 characters, more than 4000000; shorten"
    ):
        load_problems(ProblemsConfig(source=str(path)))


def test_a_source_that_never_ends_and_repeats_itself_is_refused(tmp_path, monkeypatch):
    (tmp_path / "repeats_itself.py").write_text(
        "def load(split):\n    while True: yield {'id': 'p', 'problem': 'What?', 'answer': '1'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = "in 10000 of 10001 records, the first at record 2, the id 'p' also occurs at repeats_itself:load record 1"
    with pytest.raises(UserError, match=said):
        load_problems(ProblemsConfig(source="repeats_itself:load"))
