"""Metrics of the user: their names, and that a failure in the run stops nothing and is reported once."""

from types import SimpleNamespace

import pytest
from helpers.graded import group

from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.rollout.group import StepInfo
from exprl_megatron.training.custom_metrics import custom_step_metrics
from exprl_megatron.training.run import Run

MODULE = """
def counts(step, groups):
    return {"groups": len(groups), "step": step.step}
def again(step, groups):
    return {"groups": 0}
def breaks_at_two(step, groups):
    return {"inverse": 1 / (2 - step.step)}
"""
STAGE = SimpleNamespace(name="prime")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(path, ...)`: a Run on rank 0 with these step_metrics, and what it logs."""
    (tmp_path / "mine_metrics.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugin.cache_clear()
    said: list[str] = []

    def made(*paths: str) -> tuple[Run, list[str]]:
        found = Run.__new__(Run)
        found.config = SimpleNamespace(step_metrics=paths)
        found._logger = SimpleNamespace(log=said.append)
        found._step_metrics = None
        return found, said

    yield made
    load_plugin.cache_clear()


def test_a_step_has_the_metrics_of_every_function_under_names_of_their_own(run):
    made, _ = run("mine_metrics:counts", "mine_metrics:breaks_at_two")
    found = made.custom_metrics(STAGE, 1, [group(1.0, 0.0)])
    assert found == {"custom/groups": 1.0, "custom/step": 1.0, "custom/inverse": 1.0}
    assert run()[0].custom_metrics(STAGE, 1, []) == {}


def test_a_failure_in_the_run_is_reported_once_and_stops_nothing(run):
    made, said = run("mine_metrics:breaks_at_two")
    found = [made.custom_metrics(STAGE, step, []) for step in (1, 2, 2, 3)]
    assert found == [{"custom/inverse": 1.0}, {}, {}, {"custom/inverse": -1.0}]
    assert len(said) == 1 and "mine_metrics.py, line 7, in breaks_at_two: ZeroDivisionError" in said[0]


def test_two_functions_with_one_name_are_refused(run):
    run()
    metrics = custom_step_metrics(["mine_metrics:counts", "mine_metrics:again"])
    with pytest.raises(PluginError, match=r"step_metrics\.1: mine_metrics:again .* returned 'groups', as another of"):
        metrics(StepInfo("prime", 1), [])
