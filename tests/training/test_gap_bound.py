"""How far trainer and sampler may be apart where the config sets no bound, and that a resumed run keeps it."""

import json
import math
from types import SimpleNamespace

import pytest
from helpers.scripted_run import scripted_run

from exprl_megatron.config.load import check_config, load_config
from exprl_megatron.errors import RunStopped
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training.log_prob_gap import gap_bound

STAGE = {"kind": "sparse-rl", "name": "sparse", "steps": 2, "problems": {"source": "p.jsonl"}}


def config(precision="fp32", **changes):
    tree = {"directory": "d", "policy": {"model": "m", "precision": precision}, "stages": [STAGE]}
    return check_config(tree | changes, "test")


def run_at(progress, **changes):
    """A run's part that compares log-probs."""
    return scripted_run(config(**changes), progress=progress)


@pytest.mark.parametrize(
    ("settings", "first", "later"),
    [
        ({}, 1e-4, 1e-4),
        ({"precision": "bf16"}, 0.1, 0.02),
        ({"precision": "fp8-blockwise"}, 0.3, 0.05),
        ({"precision": {"kind": "fp8-blockwise", "emulate": True}}, 0.3, 0.05),
        ({"precision": "bf16", "sync": {"fp8": True}}, 0.3, 0.05),
        ({"precision": "bf16", "server": {"extra_args": ["--quantization=fp8"]}}, 0.3, 0.05),
        ({"precision": "bf16", "server": {"extra_args": ["--kv-cache-dtype", "fp8_e4m3"]}}, 0.3, 0.05),
        ({"sync": {"max_log_prob_gap": 0.007}}, 0.007, 0.007),
        ({"sync": {"max_log_prob_gap": None}}, None, None),
    ],
)
def test_the_bound_goes_by_the_coarsest_precision_and_a_number_of_the_users_wins(settings, first, later):
    assert gap_bound(config(**settings), None) == first
    assert gap_bound(config(**settings), 1e-7) == later


def test_later_steps_may_show_five_times_what_the_first_one_did():
    assert gap_bound(config("bf16"), 0.01) == pytest.approx(0.05)
    assert gap_bound(config("bf16", sync={"max_log_prob_gap": 0.02}), 0.01) == 0.02


def test_where_weights_or_caches_are_of_several_versions_the_default_compares_nothing():
    learning = config(debug={"only": "learning", "rollouts": "other"})
    ahead = STAGE | {"max_staleness": 1, "loss": {"correction": {"kind": "truncated"}}}
    assert gap_bound(learning, None) is None
    assert gap_bound(config(stages=[ahead], sync={"pause_mode": "in_place"}), None) is None
    assert gap_bound(config(stages=[ahead]), None) == 1e-4


@pytest.mark.parametrize("gap", [1.1e-4, 0.05, math.nan, math.inf])
def test_the_first_step_is_compared_too_and_what_stops_the_run_is_not_remembered(gap):
    run = run_at(RunProgress())
    with pytest.raises(RunStopped, match=r"sync\.max_log_prob_gap \(1\.00e-04\)"):
        run.check_update(SimpleNamespace(name="sparse"), {"sampler_gap/mean": gap})
    assert run._progress.first_gap is None


def test_what_the_first_step_showed_is_in_the_checkpoint_and_bounds_the_resumed_run():
    run = run_at(RunProgress(), precision="bf16")
    run.check_update(None, {})
    assert run._progress.first_gap is None, "a step without tokens to compare is not the first"
    for gap in (0.01, 0.04):
        run.check_update(None, {"sampler_gap/mean": gap})
    progress = RunProgress.from_dict(json.loads(json.dumps(run._progress.to_dict())))
    resumed = run_at(progress, precision="bf16")
    resumed.check_update(None, {"sampler_gap/mean": 0.049})
    for gap in (0.051, math.nan):
        with pytest.raises(RunStopped):
            resumed.check_update(None, {"sampler_gap/mean": gap})


def test_a_checkpoint_from_before_has_no_first_step_to_go_by():
    record = {key: value for key, value in RunProgress(step=3).to_dict().items() if key != "first_gap"}
    assert RunProgress.from_dict(record) == RunProgress(step=3)


@pytest.mark.parametrize("recipe", ["demo", "demo-smollm"])
def test_the_demos_are_checked_by_the_default_of_whatever_precision_they_run_in(recipe):
    in_fp32, in_bf16 = (
        load_config(f"recipes/configs/{recipe}.yaml", [f"policy.precision={precision}"])
        for precision in ("fp32", "bf16")
    )
    assert [gap_bound(in_fp32, gap) for gap in (None, 1e-6)] == [1e-4, 1e-4]
    assert [gap_bound(in_bf16, gap) for gap in (None, 0.005)] == [0.1, 0.025]
