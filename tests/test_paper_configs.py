"""The paper's own runs: every config resolves, and holds the released hyper-parameters."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from exprl_megatron.cli import app
from exprl_megatron.config.load import load_config

PAPER = Path(__file__).parents[1] / "recipes" / "configs" / "paper"
RUNS = sorted(path.stem for path in PAPER.glob("*.yaml") if path.stem not in ("qwen3-4b", "qwen3-8b"))

# Table of the released scripts: problems a step, updates a step, group, upper clip, and the tokens of the judge.
RELEASED = {
    "qwen3-4b-outcome": ("exprl-outcome", 36, 2, 10, 0.28, 2048),
    "qwen3-4b-process-delta": ("exprl-process", 36, 1, 16, 0.26, 2048),
    "qwen3-4b-process-end": ("exprl-process", 36, 1, 16, 0.26, 2048),
    "qwen3-4b-process-group": ("exprl-process", 36, 1, 16, 0.26, 2048),
    "qwen3-4b-grpo": ("sparse-rl", 32, 2, 16, 0.26, 2048),
    "qwen3-8b-outcome": ("exprl-outcome", 36, 2, 16, 0.28, 4096),
    "qwen3-8b-mixed": ("exprl-process", 36, 2, 16, 0.28, 4096),
    "qwen3-8b-process-delta": ("exprl-process", 36, 1, 16, 0.26, 2048),
    "qwen3-8b-grpo": ("sparse-rl", 32, 2, 16, 0.26, None),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_run_resolves(name):
    result = CliRunner().invoke(app, ["train", str(PAPER / f"{name}.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "trainer-0" in result.output


@pytest.mark.parametrize(("name", "released"), RELEASED.items())
def test_the_released_hyper_parameters_are_those_of_the_run(name, released):
    config = load_config(PAPER / f"{name}.yaml")
    (stage,) = config.stages
    found = (stage.kind, stage.problems_per_step, stage.updates_per_step, stage.group_size, stage.loss.clip_high)
    assert (*found, config.judge and config.judge.max_new_tokens) == released
    assert (stage.optimizer.lr, stage.optimizer.betas, stage.optimizer.weight_decay) == (1e-6, (0.9, 0.999), 0.01)
    assert (stage.loss.clip_low, stage.loss.kl_coefficient, stage.loss.entropy_coefficient) == (0.2, 1e-3, 0)
    assert (stage.sampling.temperature, stage.sampling.top_p, stage.sampling.max_new_tokens) == (0.8, 1.0, 16384)


# Steps (epochs of 1,516 or 4,001 problems in whole batches), problems, checkpoints and evaluated sets of qwen8b/*.sh.
SCRIPTS_8B = {
    "outcome": (3 * (4001 // 36), "data/mixed.jsonl", 10, "data/aime-2025-gpqa.jsonl"),
    "mixed": (3 * (4001 // 36), "data/mixed.jsonl", 10, "data/aime-2025-gpqa.jsonl"),
    "process-delta": (5 * (1516 // 36), "data/int-pope.jsonl", 30, "data/aime-2025-2026.jsonl"),
    "grpo": (5 * (1516 // 32), "data/int-pope.jsonl", 20, "data/aime-2025-2026.jsonl"),
    "self-distill": (5 * (4001 // 32), "data/mixed.jsonl", 20, "data/aime-2025-gpqa.jsonl"),
    "sft": (2 * (4001 // 32), "data/mixed.jsonl", 68, "data/aime-2025-gpqa.jsonl"),
}


@pytest.mark.parametrize("name", SCRIPTS_8B)
def test_the_8b_runs_are_the_released_scripts(name):
    config = load_config(PAPER / f"qwen3-8b-{name}.yaml")
    (stage,) = config.stages
    found = (stage.steps, stage.problems.source, config.checkpoint.every_steps, config.evaluation.problems.source)
    assert found == SCRIPTS_8B[name]
    assert (config.policy.model, config.prompt.template_args) == ("models/Qwen3-8B", {"enable_thinking": False})
    assert config.judge is None or config.judge.model == "models/Qwen3-4B-Instruct-2507"


def test_the_recommended_second_stage_is_synchronous_and_corrects_for_the_sampler():
    (stage,) = load_config(PAPER / "qwen3-4b-stage2-synchronous.yaml").stages
    assert (stage.max_staleness, stage.updates_per_step, stage.loss.use_rollout_log_probs) == (0, 1, False)
    assert (stage.loss.correction.kind, stage.loss.correction.level, stage.loss.correction.high) == (
        "truncated",
        "token",
        2.0,
    )


def test_the_second_stage_is_the_released_one():
    config = load_config(PAPER / "qwen3-4b-stage2.yaml")
    (stage,) = config.stages
    assert config.judge is None
    assert stage.max_staleness > 0 and config.placement.kind == "separate", "it samples while it learns"
    assert (stage.problems_per_step, stage.group_size, stage.steps, stage.advantage) == (16, 32, 500, "mean-centered")
    assert (stage.loss.clip_low, stage.loss.clip_high, stage.loss.entropy_coefficient) == (4.0, 4.0, 1e-4)
    assert (stage.loss.kl_coefficient, stage.loss.dual_clip, stage.loss.aggregation) == (0, None, "sequence-sum")
    assert (stage.optimizer.lr, stage.optimizer.clip_grad_norm) == (1e-6, 0.3)


def test_code_and_open_ended_science_are_judged_whole_in_the_mixed_run():
    (stage,) = load_config(PAPER / "qwen3-8b-mixed.yaml").stages
    routes = {domain: stage.route(domain) for domain in ("math", "multiple-choice", "code", "science")}
    assert {d: (r.granularity, r.estimator) for d, r in routes.items()} == {
        "math": ("segment", "delta"),
        "multiple-choice": ("segment", "delta"),
        "code": ("trace", "outcome"),
        "science": ("trace", "outcome"),
    }
