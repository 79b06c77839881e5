"""What a run reads is known by its contents, wherever it is."""

import json
import shutil
from pathlib import Path

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.judging import prompt
from exprl_megatron.judging.judge_model import model_identity
from exprl_megatron.judging.prompt import JudgePrompt
from exprl_megatron.launch import input_hashes
from exprl_megatron.launch.input_hashes import hash_inputs

FIRST_MATH_TRACE = "9a7f42c7c830c375"
"""The hash of the first `math-trace`."""
PROBLEM = {"id": "a", "problem": "1 + 1?", "reference": "It is 2.", "answer": "2"}


@pytest.fixture
def files(tiny_model, tmp_path) -> Path:
    """A directory with all that a run can read."""
    for name in ("policy", "judge"):
        shutil.copytree(tiny_model("qwen3"), tmp_path / name)
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (tmp_path / "held-out.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    (tmp_path / "examples.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    for name in ("prompt", "prefix"):
        (tmp_path / f"{name}.md").write_text("## user\n{problem} {reference} {trace}\n")
    (tmp_path / "rubric.md").write_text("## user\n{problem} {reference}\n")
    return tmp_path


def contents(files: Path, reproduce: str | None = None, **judge) -> dict[str, str]:
    model_identity.cache_clear()
    input_hashes._problems.cache_clear()
    shared = {"problems": {"source": str(files / "problems.jsonl")}, "sampling": {"max_new_tokens": 64}}
    tree = {
        "directory": "run",
        "reproduce": reproduce,
        "policy": {"model": str(files / "policy")},
        "judge": {
            "model": str(files / "judge"),
            "prompt": str(files / "prompt.md"),
            "prefix_prompt": str(files / "prefix.md"),
            "rubric": {"kind": "checkpoints", "prompt": str(files / "rubric.md")},
        }
        | judge,
        "stages": [
            {"kind": "sft", "name": "sft", "steps": 1, "examples": str(files / "examples.jsonl")},
            {"kind": "exprl-outcome", "name": "prime", "steps": 1} | shared,
        ],
        "evaluation": {"problems": {"source": str(files / "held-out.jsonl")}},
    }
    return hash_inputs(check_config(tree, "test"))


def append(text: str):
    def change(path: Path) -> None:
        with open(path, "a") as file:
            file.write(text)

    return change


def one_letter(path: Path) -> None:
    path.write_text(path.read_text().replace("It is 2.", "It is 3."))


@pytest.mark.parametrize(
    ("file", "change", "key"),
    [
        ("problems.jsonl", one_letter, "stages.1.problems"),
        ("problems.jsonl", append(json.dumps(PROBLEM | {"id": "b"})), "stages.1.problems"),
        ("held-out.jsonl", one_letter, "evaluation.problems"),
        ("examples.jsonl", append('{"prompt": "q", "completion": "d"}'), "stages.0.examples"),
        ("prompt.md", append("Be strict."), "judge.prompt"),
        ("prefix.md", append("Be strict."), "judge.prefix_prompt"),
        ("rubric.md", append("Be strict."), "judge.rubric.prompt"),
        ("judge/chat_template.jinja", append(" "), "judge.model"),
        ("policy/tokenizer.json", append(" "), "policy.model"),
        ("policy/model.safetensors", append(" "), "policy.model"),
    ],
)
def test_each_change_of_a_file_is_seen_by_its_key_alone(files, file, change, key):
    before = contents(files)
    change(files / file)
    after = contents(files)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [key]


def test_the_same_files_elsewhere_and_the_same_records_in_another_spelling_are_the_same(files, tmp_path_factory):
    before = contents(files)
    elsewhere = shutil.copytree(files, tmp_path_factory.mktemp("elsewhere") / "all")
    (elsewhere / "problems.jsonl").write_text("\n" + json.dumps(dict(reversed(PROBLEM.items())), indent=None) + "\n\n")
    assert contents(elsewhere) == before


def test_a_shipped_prompt_that_another_version_of_the_program_changed_is_noticed(files, monkeypatch):
    before = contents(files)

    assembled = prompt._assembled

    def changed(parts, domain, *case):
        shipped = assembled(parts, domain, *case)
        return JudgePrompt(shipped.system + " Be strict.", shipped.user) if domain == "science" else shipped

    monkeypatch.setattr(prompt, "_assembled", changed)
    prompt._set_hash.cache_clear()
    after = contents(files)
    prompt._set_hash.cache_clear()
    assert [name for name in before if before[name] != after[name]] == ["judge.shipped_prompts"]


def test_earlier_prompts_that_are_named_by_their_hashes_are_the_same_contents(files):
    first = "31c9d89a6ee6956b527c7621afe72bfd8b546ab09a21f10b15da5d716759549a"
    named = contents(files, shipped_prompts=first, prompt=FIRST_MATH_TRACE)
    assert (named["judge.shipped_prompts"], named["judge.prompt"]) == (first, FIRST_MATH_TRACE)
    assert contents(files)["judge.shipped_prompts"] not in (first, None)
    assert contents(files, "released")["judge.shipped_prompts"] == first


def test_weights_in_megatrons_form_count(files):
    before = contents(files)
    (files / "policy" / "megatron").mkdir()
    (files / "policy" / "megatron" / "__0_0.distcp").write_bytes(bytes(300_000))
    first = contents(files)["policy.model"]
    (files / "policy" / "megatron" / "__0_0.distcp").write_bytes(bytes(299_999) + b"1")
    assert len({before["policy.model"], first, contents(files)["policy.model"]}) == 3
