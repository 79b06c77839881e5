"""What SFT learns from: the file's lines in order, or problems with their references in a new order each epoch."""

import json

import pytest
from transformers import AutoTokenizer

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import UserError
from exprl_megatron.training.examples import ExampleReader, check_source, read_examples


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def reader(model, max_tokens=160, seed=3, run_prompt=None, **stage):
    tree = {
        "directory": "d",
        "seed": seed,
        "policy": {"model": str(model), "max_tokens": max_tokens},
        "stages": [{"kind": "sft", "name": "learn", "steps": 3, **stage}],
    }
    config = check_config(tree | ({"prompt": run_prompt} if run_prompt else {}), "test")
    return ExampleReader(config, config.stages[0])


def read(model, sequences):
    """(prompt, completion) as text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [(tokenizer.decode(s.prompt_ids.tolist()), tokenizer.decode(s.response_ids.tolist())) for s in sequences]


def chat(user, system=None):
    before = "" if system is None else f"<|start|>system\n{system}<|end|>\n"
    return f"{before}<|start|>user\n{user}<|end|>\n<|start|>assistant\n"


@pytest.fixture
def problems(tmp_path):
    records = [
        {"id": f"p{i}", "problem": f"What is {i} plus 1?", "reference": f"Add: {i + 1}", "answer": str(i + 1)}
        for i in range(5)
    ]
    return write(tmp_path / "problems.jsonl", records)


def test_lines_of_a_file_come_in_order_and_over_again(model, tmp_path):
    path = write(tmp_path / "e.jsonl", [{"prompt": f"ask {i}", "completion": f"say {i}"} for i in range(3)])
    batches = reader(model, examples=path)
    assert read(model, batches.batch(2, 2)) == [(chat("ask 2"), "say 2<|end|>"), (chat("ask 0"), "say 0<|end|>")]
    assert batches.dropped == 0


def test_references_are_the_completions_and_every_epoch_has_all_problems_in_an_order_of_its_own(model, problems):
    batches = reader(model, problems={"source": problems})
    epochs = [read(model, [s for step in range(1, 6) for s in batches.batch(step + 5 * epoch, 1)]) for epoch in (0, 1)]
    expected = {(chat(f"What is {i} plus 1?"), f"Add: {i + 1}<|end|>") for i in range(5)}
    assert [set(epoch) for epoch in epochs] == [expected, expected]
    assert epochs[0] != epochs[1]
    # A pure function of seed, stage and place: a resumed run meets the same rows, however they are batched.
    again = reader(model, problems={"source": problems})
    assert read(model, again.batch(2, 5)) == epochs[1]
    assert read(model, reader(model, seed=4, problems={"source": problems}).batch(1, 5)) != epochs[0]


def test_the_stages_prompt_replaces_the_runs(model, problems, tmp_path):
    run_prompt = {"system": "Be brief.", "user": "Solve: {problem}"}
    plain = {"user": "{problem}\n"}
    source = {"problems": {"source": problems, "limit": 1}}
    asked = [
        read(model, reader(model, run_prompt=run_prompt, **source, **p).batch(1, 1)) for p in ({}, {"prompt": plain})
    ]
    assert [pair[0][0] for pair in asked] == [
        chat("Solve: What is 0 plus 1?", "Be brief."),
        chat("What is 0 plus 1?\n"),
    ]
    path = write(tmp_path / "e.jsonl", [{"prompt": "ask", "completion": "say"}])
    found = read(model, reader(model, run_prompt=run_prompt, examples=path, prompt=plain).batch(1, 1))
    assert found[0][0] == chat("ask\n")


def test_choices_are_part_of_what_is_asked(model, tmp_path):
    record = {"id": "c", "problem": "Which?", "reference": "It is B.", "answer": "B", "domain": "multiple-choice"}
    path = write(tmp_path / "c.jsonl", [record | {"choices": ["one", "two"]}])
    assert read(model, reader(model, problems={"source": path}).batch(1, 1))[0][0] == chat("Which?\nA. one\nB. two")


def test_problems_with_long_prompts_are_left_out_and_counted(model, tmp_path):
    texts = ["short", "long " * 60, "brief"]
    records = [{"id": t[:4], "problem": t, "reference": "r", "answer": "1"} for t in texts]
    source = {"source": write(tmp_path / "p.jsonl", records)}
    for settings in ({"problems": source | {"max_prompt_tokens": 60}}, {"problems": source, "max_tokens": 60}):
        batches = reader(model, **settings)
        assert batches.dropped == 1
        assert {text for text, _ in read(model, batches.batch(1, 2))} == {chat("short"), chat("brief")}


def test_a_reference_that_does_not_fit_is_named(model, tmp_path):
    record = {"id": "p7", "problem": "short", "reference": "so " * 100, "answer": "1"}
    batches = reader(model, max_tokens=64, problems={"source": write(tmp_path / "p.jsonl", [record])})
    with pytest.raises(UserError, match=r"Problem p7 with its reference has \d+ tokens, more than policy.max_tokens"):
        batches.batch(1, 1)


def test_problems_without_reference_are_refused_by_id(model, tmp_path):
    records = [{"id": "a", "problem": "p", "answer": "1"}, {"id": "b", "problem": "p", "reference": "r", "answer": "1"}]
    path = write(tmp_path / "p.jsonl", records)
    with pytest.raises(UserError, match=r"stage learn: 1 of 2 problems have no reference \(a\)"):
        reader(model, problems={"source": path})


def test_a_source_is_checked_before_anything_is_started(model, problems, tmp_path):
    def stage(**source):
        tree = {
            "directory": "d",
            "policy": {"model": "m"},
            "stages": [{"kind": "sft", "name": "a", "steps": 1, **source}],
        }
        return check_config(tree, "test").stages[0]

    check_source(stage(problems={"source": problems}))
    check_source(stage(examples=write(tmp_path / "e.jsonl", [{"prompt": "p", "completion": "c"}])))
    with pytest.raises(UserError, match="There is no file of examples"):
        check_source(stage(examples=str(tmp_path / "missing.jsonl")))
    with pytest.raises(UserError, match="line 1 has no text in `completion`"):
        check_source(stage(examples=write(tmp_path / "bad.jsonl", [{"prompt": "p"}])))
    with pytest.raises(UserError, match="There is no problem file"):
        check_source(stage(problems={"source": str(tmp_path / "missing.jsonl")}))


PAIR = json.dumps({"prompt": "p", "completion": "c"})


@pytest.mark.parametrize("text", ["\ufeff" + PAIR, f"[{PAIR}]", f"\ufeff[{PAIR}]\n", PAIR + "\r\n\n"])
def test_examples_are_read_like_problems(tmp_path, text):
    path = tmp_path / "e [1].jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_examples(path) == [("p", "c")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (PAIR.encode("utf-16"), "is not UTF-8 text"),
        (b"[" * 100_000, "this is not a JSON list"),
        (b'{"a": ' + b"[" * 100_000, "line 1: this is not JSON"),
        (b'{"prompt": "p", "completion": "c", "prompt": "q"}', "line 1: the key 'prompt' occurs twice"),
        (b'{"prompt": "p", "completion": "\\ud800"}', "line 1: the field 'completion' contains"),
        (b"[1]", "item 1: this is a JSON int"),
    ],
)
def test_examples_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, data, said):
    path = tmp_path / "e.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said):
        read_examples(path)
