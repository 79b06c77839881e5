"""The options of `exprl plan` reach the planner and its report."""

from functools import partial
from types import SimpleNamespace

import pytest

from exprl_megatron.planning import plan_report, plan_request
from exprl_megatron.planning.hardware import find_gpu


@pytest.fixture
def asked(monkeypatch):
    """What the planner and its report were called with."""
    calls = SimpleNamespace()

    def planned(target, overrides, gpu, **options):
        calls.target, calls.overrides, calls.gpu, calls.options = target, overrides, gpu, options
        return "the plan"

    monkeypatch.setattr(plan_request, "plan_target", planned)
    monkeypatch.setattr(plan_report, "print_plan", lambda found, console, top: setattr(calls, "printed", (found, top)))
    return calls


def test_every_option_reaches_the_planner_and_the_number_of_layouts_its_report(command_line, asked):
    run = ["llama-3.3-70b", "seed=1", "--gpus", "64", "--gpu", "b200", "--judge", "qwen3-32b", "--train-only"]
    lengths = ["--prompt-tokens", "7", "--response-tokens", "900"]
    status, _, errors = command_line("plan", *run, "--stage", "prime", *lengths, "--top", "3")
    assert (status, errors) == (0, "")
    assert (asked.target, asked.overrides, asked.gpu) == ("llama-3.3-70b", ["seed=1"], find_gpu("b200"))
    expected = {"gpus": 64, "judge": "qwen3-32b", "train_only": True, "stage_name": "prime", "lengths": (7.0, 900.0)}
    assert asked.options == expected
    assert asked.printed == ("the plan", 3)


@pytest.mark.parametrize("more", [["llama-3.3-70b"], ["--gpus", "8"]])
def test_a_run_that_is_compared_has_its_own_config_and_gpus(command_line, tmp_path, more):
    status, _, errors = partial(command_line, "plan")(*more, "--against", tmp_path)
    assert status == 2 and "--against takes config and GPUs from the run" in errors
