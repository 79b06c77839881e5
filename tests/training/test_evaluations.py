"""Evaluations before, within and after stages: when, under which weights, once; and where their figures are found."""

import asyncio
import json
import os
import stat
from dataclasses import replace

import pytest
from helpers.graded import graded
from helpers.scripted_run import OneRankOfResults
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from exprl_megatron.config.load import check_config
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.errors import Preempted, UserError
from exprl_megatron.reporting.metrics import read_metrics
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import read_step
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training import evaluator, loop
from exprl_megatron.training.evaluator import Evaluator
from exprl_megatron.training.first_update import AssertionCounts
from exprl_megatron.training.rollout_phase import RolloutPhase
from exprl_megatron.training.run import Run
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.training.step_record import StepRecord
from exprl_megatron.utils.files import keep_private

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "max_new_tokens": 7}


def run_config(directory, **evaluation):
    shared = {"kind": "sparse-rl", "problems": {"source": "p"}, "problems_per_step": 1}
    return check_config(
        {
            "directory": str(directory),
            "policy": {"model": "m"},
            "evaluation": {"problems": {"source": "h"}, "samples": 2, "k": [1], "sampling": SAMPLING} | evaluation,
            "stages": [shared | {"name": "prime", "steps": 5}, shared | {"name": "sparse", "steps": 2}],
        },
        "test",
    )


class Work:
    """A future that is done, unless the run is asked to stop first."""

    def __init__(self, coroutine, stopped):
        if stopped:
            return coroutine.close()
        asyncio.run(coroutine)

    def result(self):
        return None

    def cancel(self):
        return True


class Coordinator(OneRankOfResults):
    """Its work in the background is done at once, unless the run is asked to stop."""

    def start(self, coroutine):
        return Work(coroutine, self.stop)


class Servers:
    """In place of phases, prefetch, rollouts and judging runtime; writes down what is asked of them."""

    def __init__(self, coordinator):
        self.coordinator, self.events, self.sampled = coordinator, [], []
        self.version = None

    def take_metrics(self, stage, step):
        return {"loop/lag_max_s": 0.0}

    def sync_weights(self, version):
        """As for the weight sync: a version that the servers have is not sent, and has no metrics."""
        self.events.append(version)
        sent, self.version = version != self.version, version
        return {"sync/seconds": float(version[1:])} if sent else {}

    def switch_to_training(self):
        self.events.append("learn")

    def pause(self, version):
        self.events.append(f"pause {version}")

    def resume(self):
        self.events.append("resume")

    def take_memory_stats(self):
        return {}

    @property
    def problems(self):
        return self

    sampler = problems

    def count(self, problems):
        return 3

    def grade_by_answer(self):
        return None

    async def sample(self, plan, grade):
        indices, versions = list(plan.indices), plan.versions
        self.sampled.append((plan.purpose, plan.problems.source, indices, plan.group_size, plan.sampling, versions))
        updates = int(versions[0][1:])
        return [Group(f"h{i}", (graded(0, float(i < updates)), graded(1, 0.0, finish="length"))) for i in indices]

    def wait_for(self, work):
        return "nothing" if self.coordinator.stop else "done"


class Evaluating(Run):
    """A run of one rank whose steps change nothing but the version of its weights."""

    def __init__(self, config, progress=None):
        paths = RunDirectory(config.directory)
        for path in (paths.evaluations, paths.logs):
            path.mkdir(parents=True, exist_ok=True)
        self.config, self._progress = config, progress or RunProgress()
        self._coordinator = Coordinator()
        self.servers = self._phases = self._prefetch = self._rollouts = Servers(self._coordinator)
        self._logger = RunLogger(config, paths, self._progress)
        self._evaluator = Evaluator(config, paths, self.servers, self.servers, self._logger)
        self._trained_stages, self._assertions = set(), AssertionCounts()
        self._record = StepRecord(self._logger)
        self._rollout_phase = RolloutPhase(
            self._coordinator, self.servers, self.servers, self.servers, self._record, self._assertions
        )
        self._trainer_log_probs = None

    def open_stage(self, stage):
        pass

    def checkpoint_if_due(self, stage, step):
        pass

    def close_stage(self, stage):
        pass


@pytest.fixture(autouse=True)
def _steps(monkeypatch):
    def rl_step(run, stage, step):
        run._progress = replace(run._progress, updates=run._progress.updates + 1)
        return {"loss": float(step)}

    monkeypatch.setattr(loop, "rl_step", rl_step)


def evaluated(run):
    loop.run_stages(run)
    run._logger.close()
    return [(purpose, versions[0]) for purpose, *_, versions in run.servers.sampled]


def figures(config, name="evaluation/pass@1"):
    records = read_metrics(RunDirectory(config.directory).metrics)
    return {r["step"]: r["metrics"][name] for r in records if name in r["metrics"]}


def test_weights_are_evaluated_every_n_steps_of_each_stage_and_at_its_end_under_their_own_sampling(tmp_path):
    run = Evaluating(run_config(tmp_path / "run", every_steps=2))
    purpose = ("evaluation", 0)
    assert evaluated(run) == [(purpose, f"v{updates}") for updates in (0, 2, 4, 5, 7)]
    assert {sampling for *_, sampling, _ in run.servers.sampled} == {SamplingConfig(**SAMPLING)}
    assert run.servers.sampled[0][1:4] == ("h", [0, 1, 2], 2)
    # Steps that are sampled ahead wait while the weights change, and go on before the evaluation is made.
    assert run.servers.events[4:9] == ["pause v2", "v2", "resume", "learn", "pause v4"]


def test_a_sync_for_an_evaluation_is_in_the_metrics_of_the_step_that_follows_it(tmp_path):
    config = run_config(tmp_path / "run", every_steps=2)
    evaluated(Evaluating(config))
    assert figures(config, "sync/seconds") == {1: 0.0, 3: 2.0, 5: 4.0, 6: 5.0}


def test_without_an_interval_weights_are_evaluated_around_the_stages_alone(tmp_path):
    run = Evaluating(run_config(tmp_path / "run"))
    assert [version for _, version in evaluated(run)] == ["v0", "v5", "v7"]


def test_the_figures_are_in_the_metrics_tensorboard_the_files_and_the_closing_table(tmp_path):
    config = run_config(tmp_path / "run", every_steps=2)
    run = Evaluating(config)
    evaluated(run)
    shares = {0: 0, 2: 2 / 6, 4: 3 / 6, 5: 3 / 6, 7: 3 / 6}
    assert figures(config) == pytest.approx(shares)
    assert figures(config, "evaluation/length/overlong") == dict.fromkeys(shares, 0.5)
    assert figures(config, "loss").keys() == set(range(1, 8))
    paths = RunDirectory(config.directory)
    board = EventAccumulator(str(paths.tensorboard)).Reload()
    assert {e.step: e.value for e in board.Scalars("evaluation/pass@1")} == pytest.approx(shares)
    record = json.loads((paths.evaluations / "prime" / "step-4.json").read_text())
    assert (record["weight_version"], record["counts"]["h0"], record["mean_tokens"]) == ("v4", [2, 1], 3.0)
    assert list(run._evaluator.all()) == ["start", "prime/step-2", "prime/step-4", "prime", "sparse"]


def test_the_answers_are_kept_beside_the_figures_for_the_owner_alone(tmp_path):
    config = run_config(tmp_path / "run", every_steps=2)
    run = Evaluating(config)
    paths = RunDirectory(config.directory)
    before = os.umask(0o022)
    try:
        keep_private(paths.root)
        evaluated(run)
    finally:
        os.umask(before)
    made = {path.relative_to(paths.evaluations).with_suffix("") for path in paths.evaluations.rglob("*.json")}
    kept = {path.relative_to(paths.evaluations).with_suffix("") for path in paths.evaluations.rglob("*.parquet")}
    assert kept == made and len(kept) == 5
    answers = paths.evaluations / "prime" / "step-4.parquet"
    assert stat.S_IMODE(answers.stat().st_mode) == 0o600
    first, *_ = read_step(answers).groups
    assert first == Group("p", (graded(0, 1.0), graded(1, 0.0, finish="length")))


def test_an_evaluation_whose_answers_cannot_be_kept_has_not_been_made(tmp_path, monkeypatch):
    run = Evaluating(run_config(tmp_path / "run"))
    monkeypatch.setattr(evaluator, "write_step", lambda path, step: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        evaluated(run)
    assert not run._evaluator.done("start")


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_repeats_no_evaluation_and_makes_the_one_that_it_was_killed_in(tmp_path, step):
    config = run_config(tmp_path / "run", every_steps=2)
    evaluated(Evaluating(config))
    whole = figures(config)
    missing = RunDirectory(config.directory).evaluations / "prime" / "step-4.json"
    missing.unlink()
    again = Evaluating(config, RunProgress(stage=0, step=step, updates=step))
    assert [version for _, version in evaluated(again)] == ["v4"]
    assert figures(config) == whole
    lines = RunDirectory(config.directory).metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len([r for r in records if "evaluation/pass@1" in r["metrics"]]) == 5


def test_a_run_that_is_asked_to_stop_in_an_evaluation_leaves_no_result_of_it(tmp_path):
    config = run_config(tmp_path / "run", every_steps=2)
    run = Evaluating(config)
    run._progress = RunProgress(stage=0, step=2, updates=2)
    run._coordinator.stop = True
    with pytest.raises(Preempted, match=r"in the evaluation of prime/step-2; continue with --resume"):
        run.evaluate(config.stages[0], 2)
    assert not run._evaluator.done("prime/step-2")


def test_an_interval_of_no_steps_and_a_stage_named_like_the_first_evaluation_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.every_steps is 0"):
        run_config(tmp_path, every_steps=0)
    with pytest.raises(UserError, match="the name start is that of the evaluation before the first stage"):
        tree = run_config(tmp_path).model_dump(mode="json")
        tree["stages"][0]["name"] = "start"
        check_config(tree, "test")
