"""`reproduce: released`: every value that it sets is the released one, and nothing else sets such a value."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from exprl_megatron.cli import app
from exprl_megatron.config.load import check_config, load_config
from exprl_megatron.config.reproduction import ONLY_RELEASED, RELEASED
from exprl_megatron.config.resuming import leaves
from exprl_megatron.errors import UserError

PAPER = Path(__file__).parents[2] / "recipes" / "configs" / "paper"
JUDGED = ("4b-outcome", "4b-process-delta", "4b-process-end", "4b-process-group", "8b-outcome", "8b-mixed")
PROCESS = ("4b-process-delta", "4b-process-end", "4b-process-group", "8b-mixed", "8b-process-delta")
GRPO = ("4b-grpo", "8b-grpo")
FIRST = (*JUDGED, "8b-process-delta", *GRPO)
LEARNERS = (*FIRST, "4b-self-distill", "8b-self-distill", "4b-sft", "8b-sft", "4b-stage2")

# Runs, key of their resolved config, released value, where the released code (violetxi/ExpRL, dde1f7c) has it.
SETTINGS = [
    (JUDGED, "judge.parser", "released", "ray_trainer_genrm.py:1166: split at the first 'Score:'"),
    (JUDGED, "judge.prompt_order", "upstream", "prompt_templates/math_likelihood_judge.py: reference_solution is last"),
    (JUDGED, "judge.reasks", 0, "ray_trainer_genrm.py:1166: except sets the score to None, no second call"),
    (JUDGED, "judge.temperature", 0.0, "genrm config: greedy"),
    (PROCESS, "stages.0.granularity", "segment", "ray_trainer_genrm.py:1336: the prompt has one step"),
    (PROCESS, "stages.0.segments.splitter", "released", "ray_trainer_genrm.py:1252: _find_step_spans"),
    (PROCESS, "stages.0.segments.min_tokens", 0, "ray_trainer_genrm.py:1252: every ### closes a segment"),
    (PROCESS, "stages.0.segments.max_segments", None, "ray_trainer_genrm.py:1252: and there is no largest number"),
    ((*JUDGED, "8b-process-delta"), "stages.0.variant", "code", "core_algos.py:305 and 421"),
    ((*JUDGED, "8b-process-delta"), "stages.0.overlong", "zero", "scripts: custom_reward_function.clip_length=True"),
    (GRPO, "stages.0.overlong", "score", "qwen4b/grpo.sh: main_ppo clips no reward"),
    (GRPO, "stages.0.advantage", "group-normalized", "qwen4b/grpo.sh: adv_estimator=grpo"),
    (FIRST, "stages.0.loss.aggregation", "micro-batch-mean", "dp_actor.py:475: x rows / ppo_mini_batch_size"),
    (FIRST, "stages.0.loss.use_rollout_log_probs", False, "ray_trainer: old_log_prob is computed by the actor"),
    (FIRST, "stages.0.loss.dual_clip", 3.0, "actor.yaml: clip_ratio_c"),
    (FIRST, "stages.0.max_staleness", 0, "ray_trainer: fit() is synchronous"),
    (FIRST, "policy.micro_batch_tokens", 32768, "scripts: ppo_max_token_len_per_gpu x ulysses_sequence_parallel_size"),
    (FIRST, "verifier.variant", "prime", "reward_score/__init__.py:108: prime_math"),
    (FIRST, "evaluation.every_steps", 10, "scripts: test_freq=10"),
    (FIRST, "evaluation.samples", 4, "scripts: val_kwargs.n=4"),
    (FIRST, "evaluation.sampling.temperature", 0.8, "scripts: val_kwargs.temperature=0.8"),
    (("4b-self-distill", "8b-self-distill"), "stages.0.aggregation", "sequence-mean", "ppo_micro_batch_size_per_gpu=1"),
    (LEARNERS, "stages.0.optimizer.decay_norms_and_biases", True, "fsdp_workers.py:430: AdamW(module.parameters())"),
    (LEARNERS, "stages.0.optimizer.warmup_from_zero", True, "torch_functional.py:509: current_step / num_warmup_steps"),
    (("4b-sft",), "stages.0.optimizer.warmup_steps", 9, "fsdp_sft_trainer.py:339: int(94 x 0.1)"),
    (("8b-sft",), "stages.0.optimizer.warmup_steps", 25, "fsdp_sft_trainer.py:339: int(250 x 0.1)"),
    (("4b-stage2",), "verifier.variant", "code", "domains/math/verifier_api.py:106: math_verify, strict"),
    (("4b-stage2",), "stages.0.loss.use_rollout_log_probs", True, "finetune/rl/__init__.py:234: old_logprobs of vLLM"),
    (("4b-stage2",), "stages.0.loss.clip_high", 4.0, "conf/finetune/base.yaml: epsilon 4, so that the bound is 5"),
    (("4b-stage2",), "stages.0.loss.aggregation", "sequence-sum", "finetune/rl/__init__.py: 1 / batch_size of a token"),
    (("4b-stage2",), "stages.0.loss.correction.kind", "none", "finetune/rl/__init__.py: the ratio alone"),
    (("4b-stage2",), "stages.0.overlong", "score", "conf/exp_stage2_dense_outcome.yaml: overlong_filtering false"),
    (("4b-stage2",), "sync.pause_mode", "in_place", "vllm0.py:154: receive_weight_update leaves the cache"),
    (("4b-stage2",), "evaluation.sampling.top_p", 0.95, "conf/exp_stage2_dense_outcome.yaml: test_llm"),
    (("4b-stage2",), "evaluation.sampling.top_k", 20, "conf/exp_stage2_dense_outcome.yaml: test_llm"),
    (("4b-stage2",), "evaluation.samples", 1, "pipelinerl/actor.py:823: one attempt of a test problem"),
]


@pytest.fixture(scope="module")
def resolved():
    names = {name for names, *_ in SETTINGS for name in names}
    return {name: load_config(PAPER / f"qwen3-{name}.yaml") for name in sorted(names)}


@pytest.mark.parametrize(("runs", "key", "value", "source"), SETTINGS, ids=[f"{s[0][0]}-{s[1]}" for s in SETTINGS])
def test_a_value_of_the_papers_runs_is_the_released_one(resolved, runs, key, value, source):
    found = {run: leaves(resolved[run].model_dump(mode="json"))[key] for run in runs}
    assert found == dict.fromkeys(runs, value), source


def test_every_setting_of_the_key_is_held_by_a_row_above():
    held = {(key.replace("stages.0.", ""), value) for _, key, value, _ in SETTINGS}
    assert {(released.key, released.value) for released in RELEASED} <= held


def test_the_papers_runs_depart_from_nothing_and_stay_the_same_when_they_are_read_again(resolved):
    for name, config in resolved.items():
        assert (config.reproduce, config.deviations) == ("released", []), name
        assert check_config(config.model_dump(mode="json"), name) == config


@pytest.mark.parametrize("name", ["4b-outcome", "4b-process-delta", "4b-grpo", "4b-sft", "8b-mixed"])
def test_without_the_key_a_run_has_the_recommended_values(name):
    found = load_config(PAPER / f"qwen3-{name}.yaml", ["reproduce=null"])
    plain = leaves(found.model_dump(mode="json"))
    assert not found.deviations
    for key, values in ONLY_RELEASED.items():
        assert plain.get(key.replace("stages.", "stages.0."), "absent") not in values
    assert plain["stages.0.optimizer.decay_norms_and_biases"] is False
    assert plain.get("stages.0.granularity", "prefix") == "prefix"


STAGE = {"name": "a", "steps": 1, "problems": {"source": "x"}}
KINDS = {
    "judge": "exprl-process",
    "verifier": "sparse-rl",
    "stages.segments": "exprl-process",
    "stages.loss": "sparse-rl",
    "stages.aggregation": "self-distill",
}


def tree(kind, stage=None, **changes):
    stages = [STAGE | {"kind": kind} | (stage or {})]
    return {"directory": "d", "policy": {"model": "m"}, "judge": {"model": "j"}, "stages": stages} | changes


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ONLY_RELEASED.items() for value in values])
def test_a_part_of_the_released_code_alone_is_refused(key, value):
    kind = next(kind for start, kind in KINDS.items() if key.startswith(start))
    *sections, last = key.removeprefix("stages.").split(".")
    given = {last: value}
    for section in reversed(sections):
        given = {section: given}
    if key.startswith("stages."):
        wrong = tree(kind, given)
    elif key.startswith("judge."):
        wrong = tree(kind, judge={"model": "j"} | given["judge"])
    else:
        wrong = tree(kind, **given)
    named = key.replace("stages.", "stages.0.").replace(".", r"\.")
    with pytest.raises(UserError, match=rf"{named} is {value}, which reproduces one part .* set reproduce to released"):
        check_config(wrong, "t")
    check_config(wrong | {"reproduce": "released"}, "t")


def test_a_value_of_the_config_takes_precedence_and_is_reported():
    given = tree("exprl-process", {"granularity": "prefix"}, reproduce="released", judge={"model": "j", "reasks": 2})
    found = check_config(given, "t")
    assert (found.stages[0].granularity, found.judge.reasks, found.judge.parser) == ("prefix", 2, "released")
    used = "the config's own value is used."
    assert sorted(found.deviations) == [
        f"reproduce is released, but judge.reasks is 2 where the released code has 0: {used}",
        f"reproduce is released, but stages.0.granularity is prefix where the released code has segment: {used}",
    ]


def test_the_dry_run_reports_what_departs_and_shows_what_was_set():
    arguments = ["train", str(PAPER / "qwen3-4b-process-delta.yaml"), "--dry-run", "stages.0.granularity=prefix"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "stages.0.granularity is prefix where the released code has segment" in " ".join(result.output.split())
    assert "splitter: released" in result.output and "aggregation: micro-batch-mean" in result.output


def test_one_run_of_both_sparse_stages_is_refused_as_their_verifiers_differ():
    both = [STAGE | {"kind": "sparse-rl", "advantage": "group-normalized"}, STAGE | {"kind": "sparse-rl", "name": "b"}]
    with pytest.raises(UserError, match="in different ways, and the config has a sparse-rl stage of each"):
        check_config(tree("sft", reproduce="released") | {"stages": both}, "t")


def test_another_word_than_released_is_refused():
    with pytest.raises(UserError, match="reproduce is 'paper'"):
        check_config(tree("sparse-rl", reproduce="paper"), "t")
