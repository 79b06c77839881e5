"""Prompts are made and measured before anything starts, and the dry run shows them."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judge import Judge
from exprl_megatron.launch.dry_run import print_prompts
from exprl_megatron.launch.preflight import check_inputs, dry_run
from exprl_megatron.problems.sources import load_problems


@pytest.fixture
def tree(tmp_path, tiny_model):
    problems = tmp_path / "problems.jsonl"
    record = {"id": "p1", "problem": "What is 1 + 1?", "reference": "HIDDEN: one and one is two.", "answer": "2"}
    problems.write_text(json.dumps(record) + "\n")
    return {
        "directory": str(tmp_path / "run"),
        "policy": {"model": str(tiny_model("qwen3")), "max_tokens": 512},
        "judge": {"model": str(_longer(tiny_model("qwen3"), tmp_path, 32_768)), "max_new_tokens": 64},
        "stages": [
            {
                "kind": "exprl-outcome",
                "name": "prime",
                "steps": 1,
                "problems": {"source": str(problems)},
                "sampling": {"max_new_tokens": 128},
            }
        ],
    }


def _longer(model, tmp_path, positions):
    """The same model with another context."""
    copy = tmp_path / f"judge-{positions}"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return copy


def test_the_dry_run_shows_that_the_reference_is_the_judges_alone(tree, capsys):
    config = check_config(tree, "test")
    assert dry_run(config) is None
    print_prompts(config)
    policy, judge = capsys.readouterr().out.split("to the judge (system)")
    assert "What is 1 + 1?" in policy and "HIDDEN" not in policy
    assert "What is 1 + 1?" in judge and "HIDDEN" in judge and "(the trace)" in judge


def test_a_judge_without_room_for_reference_trace_and_answer_is_refused(tree, tiny_model, tmp_path):
    check_inputs(check_config(tree, "test"))
    tree["judge"]["max_new_tokens"] = 32_000
    with pytest.raises(
        UserError, match=r"context of 32768 tokens.*problem p1.*sampling.max_new_tokens.*judge.max_new_tokens"
    ):
        check_inputs(check_config(tree, "test"))


@pytest.mark.parametrize(("room", "refused"), [(0, True), (2_000, True), (30_000, False)])
def test_a_judge_without_room_for_checkpoints_is_refused(tree, tmp_path, room, refused):
    """The longer of both prompts counts, with as many tokens of a rubric as it may be written in."""
    plain = check_config(tree, "test")
    judge = Judge(plain.judge, [], AutoTokenizer.from_pretrained(plain.judge.model))
    (problem,) = load_problems(plain.stages[0].problems)
    fits = len(judge.prompt_ids(problem, "", "trace")) + 128 + 64
    tree["judge"] |= {"rubric": {"kind": "checkpoints", "max_new_tokens": 3_000}}
    tree["judge"]["model"] = str(_longer(Path(plain.policy.model), tmp_path, fits + room))
    check_inputs(check_config(tree | {"judge": tree["judge"] | {"rubric": {"kind": "reference"}}}, "test"))
    if refused:
        with pytest.raises(
            UserError, match=r"checkpoints of up to 3000 \(judge.rubric.max_new_tokens\) without a trace"
        ):
            check_inputs(check_config(tree, "test"))
    else:
        check_inputs(check_config(tree, "test"))


@pytest.mark.parametrize("what", ["policy", "judge"])
def test_a_template_that_takes_no_system_message_is_refused_before_anything_starts(tree, tmp_path, tiny_model, what):
    model = _longer(tiny_model("qwen3"), tmp_path, 32_767)
    refuses = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}"
    )
    (model / "chat_template.jinja").write_text(refuses + "{% endfor %}")
    tree[what]["model"] = str(model)
    tree["prompt"] = {"system": "Be brief."}
    with pytest.raises(UserError, match="no system") as caught:
        dry_run(check_config(tree, "test"))
    assert ("prompt.system" if what == "policy" else "judge") in str(caught.value)


def test_a_model_that_is_elsewhere_is_said_not_to_be_checked(tree):
    tree["policy"]["model"] = "/nowhere/model"
    assert "not checked" in dry_run(check_config(tree, "test"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sampling": {"max_new_tokens": 128, "top_p": 0.9}}, "top_p 0.9"),
        ({"sampling": {"max_new_tokens": 128, "top_k": 20}}, "top_k 20"),
        ({"group_size": 1}, "every advantage is 0"),
        ({"group_size": 1, "advantage": "leave-one-out"}, "every advantage is 0"),
        ({"group_size": 1, "advantage": "mean-centered"}, "every advantage is 0"),
        ({"group_size": 1, "advantage": "group-centered-batch-normalized"}, "every advantage is 0"),
    ],
)
def test_a_stage_that_would_learn_nothing_or_from_another_policy_is_refused(tree, changes, sentence):
    tree["stages"][0] |= changes
    with pytest.raises(UserError, match=sentence):
        check_config(tree, "test")


def test_one_trace_a_group_is_enough_where_batches_are_compared(tree):
    tree["stages"][0] |= {"group_size": 1, "advantage": "batch-normalized"}
    check_config(tree, "test")
