"""Inputs that are easily misread in silence: each is read as it is meant, or refused with a sentence that names it."""

import json

import datasets
import pytest
from tokenizers import AddedToken

from exprl_megatron.config.problems import ProblemsConfig, PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptBuilder, drop_overlong
from exprl_megatron.problems.sources import load_problems

RECORD = {"id": "p1", "problem": "1 + 1?", "answer": "2"}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
NO_SYSTEM += "{{ m.content }}{% endfor %}"
DROPS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"


def _load(path, **config):
    return load_problems(ProblemsConfig(source=str(path), **config))


def _fault(path, content):
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        _load(path)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "brackets [v1]",
        "[abc]",
        "a*b",
        "what?",
        "colon:here",
        "hf://x",
        "s3:x",
        "a::b",
        "{a,b}",
        "100%",
        "a#b",
        " space ",
        "ü",
        "zip:",
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_path_is_a_path_and_no_pattern(tmp_path, name, kind):
    directory = tmp_path / name
    directory.mkdir(parents=True)
    file = directory / f"train {name.replace('/', '')}.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list([RECORD]).to_parquet(tmp_path / "plain.parquet")
        (tmp_path / "plain.parquet").rename(file)
    else:
        file.write_text(json.dumps(RECORD) + "\n")
    assert [problem.id for problem in _load(file)] == ["p1"]
    assert [problem.id for problem in _load(directory)] == ["p1"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", ""])
def test_a_byte_order_mark_and_line_ends_are_not_part_of_a_record(tmp_path, mark, ending):
    lines = [json.dumps(RECORD | {"id": name}) for name in ("a", "b")]
    path = tmp_path / "a.jsonl"
    path.write_bytes((mark + (ending or "\n").join(lines) + ending).encode())
    assert [problem.id for problem in _load(path)] == ["a", "b"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_list_is_its_records(tmp_path, mark, indent, name):
    path = tmp_path / name
    path.write_text(mark + "\n" + json.dumps([RECORD | {"id": "a"}, RECORD | {"id": "b"}], indent=indent), "utf-8")
    assert [problem.id for problem in _load(path)] == ["a", "b"]
    assert [problem.id for problem in _load(path, limit=1)] == ["a"]


def test_faults_of_a_json_list_name_the_item(tmp_path):
    path = tmp_path / "a.json"
    assert "item 2: this is a JSON str" in _fault(path, json.dumps([RECORD, "x"]))
    assert "is not a JSON list" in _fault(path, "[{}")
    assert "is empty" in _fault(path, "[]")


@pytest.mark.parametrize("field", ["id", "problem", "reference", "answer", "source"])
@pytest.mark.parametrize("half", [r"\ud800", r"x \udfff y", r"\udc00\ud800"])
def test_half_a_character_is_refused_with_line_and_field(tmp_path, field, half):
    line = json.dumps(RECORD | {field: "HALF"}).replace("HALF", half)
    message = _fault(tmp_path / "a.jsonl", f"{json.dumps(RECORD | {'id': 'p0'})}\n{line}\n")
    assert "line 2" in message and f"'{field}'" in message and "a lone surrogate" in message


def test_half_a_character_in_a_test_or_a_choice_is_refused(tmp_path):
    code = json.dumps({"id": "p", "problem": "q", "domain": "code", "tests": [{"input": "HALF", "output": ""}]})
    assert "a lone surrogate" in _fault(tmp_path / "a.jsonl", code.replace("HALF", r"\ud800"))
    choice = json.dumps({"id": "p", "problem": "q", "domain": "multiple-choice", "choices": ["a", "HALF"]})
    assert "a lone surrogate" in _fault(tmp_path / "a.jsonl", choice.replace("HALF", r"\ud800"))
    whole = json.dumps(RECORD | {"problem": "PAIR"}).replace("PAIR", r"\ud83d\ude00")
    (tmp_path / "a.jsonl").write_text(whole)
    assert _load(tmp_path / "a.jsonl")[0].text == "\U0001f600"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
def test_what_is_not_a_number_is_not_an_answer(tmp_path, number):
    message = _fault(tmp_path / "a.jsonl", json.dumps(RECORD | {"answer": 0}).replace("0}", f"{number}}}"))
    assert "line 1" in message and "not a number" in message


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("1e-05", "0.00001"),
        ("5", "5"),
        ("5.0", "5.0"),
        ("-0.5", "-0.5"),
        ("1e22", "1" + "0" * 22),
        ("1e-7", "0.0000001"),
    ],
)
def test_numbers_as_answers_are_written_out(tmp_path, number, text):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORD | {"answer": 0}).replace("0}", f"{number}}}"))
    assert _load(path)[0].answer == text


def test_brackets_without_end_are_a_fault_of_the_line(tmp_path):
    assert "line 1: this is not JSON" in _fault(tmp_path / "a.jsonl", '{"id": ' + "[" * 100_000)


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_model("qwen3"))
    loaded.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<think>", special=False)])
    loaded.chat_template = TEMPLATE
    return loaded


def _drop(tokenizer, text):
    return drop_overlong([Problem("p7", text)], PromptBuilder(tokenizer, PromptConfig()), 10_000)


def test_a_control_token_in_a_problem_is_refused_with_its_id(tokenizer):
    for token in {"<|end|>", *tokenizer.all_special_tokens}:
        with pytest.raises(UserError, match=r"problem p7 contains .* control token"):
            _drop(tokenizer, f"3 {token} 4")
    assert len(_drop(tokenizer, "3 < |end|> 4, <think> and a < b > c")) == 1


@pytest.mark.parametrize(
    ("template", "why"), [(NO_SYSTEM, "System role not supported"), (DROPS_SYSTEM, "leaves out the system")]
)
def test_a_template_that_refuses_the_system_message_is_named(tokenizer, template, why):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=why) as caught:
        PromptBuilder(tokenizer, PromptConfig(system="Be brief."))
    assert "prompt.system" in str(caught.value)
    assert tokenizer.name_or_path in str(caught.value)
    PromptBuilder(tokenizer, PromptConfig())


def test_a_text_of_unknown_tokens_is_refused(tokenizer, monkeypatch):
    class Unknown:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        unk_token_id = 3

        def __call__(self, text, **settings):
            return {"input_ids": [3 if word == "?" else 5 for word in text.split()]}

    builder = PromptBuilder(Unknown(), PromptConfig())
    assert "2 unknown tokens of 3" in builder.fault("? ? a")
    assert builder.fault("? a") is None


@pytest.mark.parametrize("wrap", ["%s", "[%s]"])
def test_a_key_that_is_given_twice_is_refused_and_not_read_as_the_last(tmp_path, wrap):
    line = '{"id": "a", "problem": "1?", "answer": "2", "problem": "3?"}'
    assert "the key 'problem' occurs twice in one object" in _fault(tmp_path / "a.jsonl", wrap % line)
