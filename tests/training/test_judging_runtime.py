"""When the judge is checked against its gate, with which judge, and over which judgements abstentions are counted."""

import asyncio
import json
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
from helpers.graded import cut, graded

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.rollout.group import Group
from exprl_megatron.training import judging_runtime as module
from exprl_megatron.training.judging_runtime import JudgingRuntime


class Gate:
    """Keeps with which judge and for which place it was asked; fails at the places of `fails`."""

    def __init__(self, *fails):
        self.fails, self.checked, self.required = fails, [], []

    async def evaluate(self, grade):
        self.checked.append(grade)
        return SimpleNamespace(metrics=lambda: {"auroc": 0.5})

    def require_pass(self, result, where):
        self.required.append(where)
        if where in self.fails:
            raise RunStopped(f"{where}: the judge did not pass its gate")


def config(every_steps=None, **judge):
    shared = {"steps": 5, "problems": {"source": "p"}}
    return check_config(
        {
            "directory": "d",
            "policy": {"model": "m"},
            "judge": {"model": "j", "gate": {"traces": "t.jsonl", "every_steps": every_steps}} | judge,
            "stages": [
                shared | {"kind": "sparse-rl", "name": "warm"},
                shared | {"kind": "exprl-outcome", "name": "prime"},
                shared | {"kind": "exprl-process", "name": "steps"},
                shared | {"kind": "sparse-rl", "name": "sparse"},
            ],
        },
        "test",
    )


def runtime(of_config, gate=None):
    made = JudgingRuntime.__new__(JudgingRuntime)
    made._config, made._gate, made._windows, made._open = of_config, gate, {}, ExitStack()
    made._gate_metrics = {}
    made._judge = SimpleNamespace(grade="with the store")
    made._uncached_judge = SimpleNamespace(grade="without a store")
    made.said = []
    made._logger = SimpleNamespace(log=made.said.append)
    return made


def checked(of_config, gate):
    """The gate's places in a whole run, in order."""
    made = runtime(of_config, gate)
    for stage in of_config.stages:
        for step in range(1, stage.steps + 1):
            asyncio.run(made.check_judge(stage, step))
    return gate.required


def test_the_gates_traces_may_have_a_domain_of_the_runs_own(tmp_path, monkeypatch):
    line = {"reference": "r", "trace": "t", "domain": "counting"}
    rows = [
        line | {"problem_id": name, "problem": name, "correct": right} for name, right in (("a", True), ("b", False))
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(module, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(module, "_verifier", lambda config: nullcontext())
    tree = config().model_dump(mode="json")
    tree["judge"]["gate"]["traces"] = str(tmp_path / "t.jsonl")
    tree["stages"][1]["problems"]["domains"] = ["counting"]
    made = JudgingRuntime(check_config(tree, "test"), tmp_path / "s.sqlite", [], SimpleNamespace(log=None))
    assert made._gate is not None
    tree["stages"][1]["problems"]["domains"] = []
    with pytest.raises(UserError, match="the field 'domain' is 'counting'"):
        JudgingRuntime(check_config(tree, "test"), tmp_path / "s.sqlite", [], SimpleNamespace(log=None))


def test_the_judge_is_checked_before_the_first_step_that_it_grades_and_never_again_without_an_interval():
    assert checked(config(), Gate()) == ["stage prime, before step 1"]


def test_with_an_interval_it_is_checked_every_n_steps_of_the_stages_that_it_grades():
    places = checked(config(every_steps=2), Gate())
    assert places == [f"stage {name}, before step {step}" for name in ("prime", "steps") for step in (1, 3, 5)]


def test_the_judge_that_is_checked_is_the_one_that_asks_the_servers_again():
    gate = Gate()
    checked(config(every_steps=4), gate)
    assert set(gate.checked) == {"without a store"}


def test_a_judge_that_fails_its_gate_stops_the_run_with_its_figures_said():
    gate = Gate("stage prime, before step 1")
    made = runtime(config(), gate)
    with pytest.raises(RunStopped, match="stage prime, before step 1: the judge did not pass its gate"):
        asyncio.run(made.check_judge(made._config.stages[1], 1))
    assert made.said == ["the judge before step 1 of prime: auroc 0.500"]


def test_the_figures_of_the_gate_are_metrics_of_the_step_before_which_it_was_checked_once():
    made = runtime(config(every_steps=2), Gate())
    prime = made._config.stages[1]
    for step in (1, 2, 3):
        asyncio.run(made.check_judge(prime, step))
    taken = [made.take_gate_metrics("prime", step) for step in (1, 2, 3, 3)]
    assert taken == [{"gate/auroc": 0.5}, {}, {"gate/auroc": 0.5}, {}]


def test_a_run_without_a_gate_checks_nothing():
    asyncio.run(runtime(config()).check_judge(config().stages[1], 1))


def _group(*verdicts):
    return Group("p", tuple(graded(i, verdict) for i, verdict in enumerate(verdicts)))


def test_the_judges_abstentions_are_counted_over_its_window_of_several_steps_of_one_stage():
    made = runtime(config(max_abstention_rate=0.25, abstention_window=8))
    _, prime, steps, _ = made._config.stages
    made.check_abstentions(prime, 1, [_group(1.0, 1.0, 1.0, None)])
    made.check_abstentions(steps, 1, [_group(1.0, 1.0, 1.0, None)])
    with pytest.raises(RunStopped, match=r"stage prime, step 2: of the last 8 judgements 3 are abstentions"):
        made.check_abstentions(prime, 2, [_group(1.0, 1.0, None, None)])


def test_the_verifiers_abstentions_are_counted_over_one_step_by_the_stages_own_bound():
    made = runtime(config(max_abstention_rate=0.0))
    sparse = made._config.stages[3].model_copy(update={"max_abstention_rate": 0.25})
    made.check_abstentions(sparse, 1, [_group(1.0, 0.0, 0.0, None)])
    made.check_abstentions(sparse, 2, [_group(1.0, 0.0, 0.0, None)])
    with pytest.raises(RunStopped, match=r"stage sparse, step 3: of the last 4 judgements 2 are abstentions"):
        made.check_abstentions(sparse, 3, [_group(1.0, 0.0, None, None)])


def test_every_segments_abstention_counts():
    made = runtime(config(max_abstention_rate=0.4))
    traces = (cut(0, (None, 1), (None, 1), (0.5, 1)), cut(1, (0.5, 1)))
    with pytest.raises(RunStopped, match=r"of the last 4 judgements 2 are abstentions"):
        made.check_abstentions(made._config.stages[2], 1, [Group("p", traces)])


def test_self_distillation_has_no_judgements_to_count():
    made = runtime(config(max_abstention_rate=0.0))
    tree = {"directory": "d", "policy": {"model": "m"}}
    stage = {"kind": "self-distill", "name": "s", "steps": 1, "problems": {"source": "p"}}
    (distill,) = check_config(tree | {"stages": [stage]}, "test").stages
    made.check_abstentions(distill, 1, [_group(None, None)])
