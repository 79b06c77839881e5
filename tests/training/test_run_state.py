"""What a run asks of its policy, its servers and its log, and what it knows afterwards; all of these are scripted."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.graded import graded
from helpers.scripted_run import OneRank, scripted_run

from exprl_megatron.algorithms.batch import TrainSample, pad
from exprl_megatron.config.load import check_config
from exprl_megatron.errors import GradientNotFinite, Preempted, RunStopped
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.runs.log_prob_files import TrainerLogProbFiles
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training import run as module
from exprl_megatron.training import run_saves


class Parts:
    """In place of policy, phases, prefetch, rollouts and the reference's scorer; keeps what is asked of them."""

    def __init__(self, sampled=None, missing=True, waits=()):
        self.events, self.sampled, self.missing, self.waits = [], sampled, missing, list(waits)
        self.norm = 1.0

    def begin_stage(self, *arguments, keep_ref_policy=None):
        if keep_ref_policy is None:
            self.events.append(f"push ref of {arguments[0]}")
        else:
            self.events.append(("begin", arguments[1], keep_ref_policy))

    def apply_update(self, gradient_scale):
        self.events.append(("update", gradient_scale))
        if self.norm is None:
            raise GradientNotFinite("The gradient norm of update 1 is nan")
        return SimpleNamespace(grad_norm=self.norm, learning_rate=0.5)

    def log_probs(self, samples, *how, **more):
        self.events.append(("log-probs", how, more))
        return [np.zeros(1)] * len(samples)

    def sync_weights(self, version):
        self.events.append(f"sync {version}")
        return {"sync/seconds": 1.0}

    def switch_to_training(self):
        self.events.append("train")

    def needs_weights(self, stage, step, version):
        return self.missing

    def start(self, stage, step, prompts_consumed, version):
        self.events.append(("start", step, prompts_consumed, version))
        return "work"

    def take(self, stage, step):
        self.events.append(("take", step))
        return self.sampled

    async def wait_for(self, work):
        return self.waits.pop(0) if self.waits else "done"

    async def check_served(self):
        self.events.append("check served")

    @property
    def problems(self):
        return self

    def texts(self, stage):
        return {}

    def prune_log(self, stage, step):
        self.events.append(("prune", step))


def config(directory, *stages, **changes):
    shared = {"kind": "sparse-rl", "problems": {"source": "p"}, "steps": 4, "problems_per_step": 2}
    tree = {"directory": str(directory), "policy": {"model": "m"}, "stages": [shared | stage for stage in stages]}
    return check_config(tree | changes, "test")


def run_of(of_config, parts, progress=None, checkpoint=None, scorer=None):
    """A run between two stages, with `parts` in all places."""
    made = scripted_run(
        of_config,
        policy=parts,
        coordinator=OneRank(),
        servers={"phases": parts, "ref_scorer": scorer},
        rank_zero={"rollouts": parts, "prefetch": parts},
        progress=progress,
        checkpoint=checkpoint,
    )
    made._record.begin(of_config.stages[0].name, 1)
    return made


@pytest.fixture
def loaded(monkeypatch):
    """The checkpoints that were loaded, among the events of the parts."""
    monkeypatch.setattr(run_saves, "load_checkpoint", lambda path, policy: policy.events.append(f"load {path}"))


KL = {"loss": {"kl_coefficient": 0.1}}


def test_a_stage_has_as_many_updates_as_its_steps_take_and_keeps_the_reference_policy_where_the_loss_needs_it(
    tmp_path, loaded
):
    of_config = config(tmp_path, {"name": "a", "updates_per_step": 2}, {"name": "b"} | KL)
    parts = Parts()
    made = run_of(of_config, parts)
    for stage in of_config.stages:
        made.open_stage(stage)
    assert parts.events == ["train", ("begin", 8, False), "train", ("begin", 4, True)]


def test_a_server_of_its_own_gets_the_reference_policy_before_a_checkpoint_is_loaded(tmp_path, loaded):
    of_config, parts = config(tmp_path, {"name": "b"} | KL), Parts()
    run_of(of_config, parts, RunProgress(step=1), "checkpoint-1", scorer=parts).open_stage(of_config.stages[0])
    assert parts.events == ["train", ("begin", 4, False), "push ref of b", "load checkpoint-1"]


@pytest.mark.parametrize(("step", "loads"), [(0, False), (1, True), (3, True)])
def test_a_checkpoint_is_loaded_once_and_only_within_its_stage(tmp_path, loaded, step, loads):
    of_config, parts = config(tmp_path, {"name": "a"}, {"name": "b"}), Parts()
    made = run_of(of_config, parts, RunProgress(step=step), "checkpoint-1")
    for stage in of_config.stages:
        made.open_stage(stage)
    assert parts.events.count("load checkpoint-1") == loads
    assert parts.events[-1] == ("begin", 4, False), "the second stage begins with the first one's weights"


def test_what_is_left_of_a_run_begins_behind_what_is_done(tmp_path):
    of_config = config(tmp_path, {"name": "a"}, {"name": "b"}, {"name": "c"})
    made = run_of(of_config, Parts(), RunProgress(stage=1, step=2, prompts_consumed=4, traces=9))
    left = [(stage.name, list(made.remaining_steps(stage))) for stage in made.remaining_stages()]
    assert left == [("b", [3, 4]), ("c", [1, 2, 3, 4])]
    assert made._progress == RunProgress(stage=3, traces=9)


def _sampled():
    one = graded(0, 1.0, tokens=3)
    return SampledStep([Group("p", (one, graded(1, None, tokens=5)))], 2, Counter(asked=3))


def test_groups_are_sampled_under_the_newest_weights_and_the_servers_are_checked_before_the_trainer_continues(tmp_path):
    of_config = config(tmp_path, {"name": "a", "kind": "exprl-outcome"}, judge={"model": "j"})
    parts = Parts(_sampled())
    made = run_of(of_config, parts, RunProgress(step=2, updates=7, prompts_consumed=6, traces=1, tokens=10))
    groups = made.graded_groups(of_config.stages[0], 3)
    assert parts.events == ["sync v7", ("start", 3, 6, "v7"), ("take", 3), "check served", "train"]
    assert groups == parts.sampled.groups
    assert made._progress == RunProgress(0, 2, 7, prompts_consumed=8, traces=3, tokens=18, abstentions=1)
    assert made._record.counts == {"judge/asked": 3.0} and made._record.finish()["sync/seconds"] == 1.0
    assert made._assertions.syncs == 1


def test_where_the_log_has_the_step_no_weights_are_sent(tmp_path):
    of_config, parts = config(tmp_path, {"name": "a"}), Parts(_sampled(), missing=False)
    run_of(of_config, parts).graded_groups(of_config.stages[0], 1)
    assert parts.events == [("start", 1, 0, "v0"), ("take", 1), "check served", "train"]


def test_servers_that_come_while_the_step_is_awaited_get_the_same_weights(tmp_path):
    of_config = config(tmp_path, {"name": "a"})
    parts = Parts(_sampled(), waits=["nothing", "weights", "nothing"])
    run_of(of_config, parts, RunProgress(updates=5)).graded_groups(of_config.stages[0], 1)
    assert parts.events[:4] == ["sync v5", ("start", 1, 0, "v5"), "sync v5", ("take", 1)]


def test_an_update_counts_once_it_is_taken_and_names_the_next_version(tmp_path):
    made = run_of(config(tmp_path, {"name": "a"}), Parts())
    assert made.apply_update(0.5) == {"grad_norm": 1.0, "learning_rate": 0.5}
    assert made.policy.events == [("update", 0.5)]
    assert (made.weight_version, made._record.updates) == ("v1", 1)


def test_the_updates_of_a_step_are_counted_from_its_start(tmp_path, monkeypatch):
    of_config, parts = config(tmp_path, {"name": "a"}), Parts()
    parts.take_memory_stats = parts.take_metrics = lambda *_: {}
    made, counted = run_of(of_config, parts), []
    for step in (1, 2):
        with made.step(of_config.stages[0], step):
            made.apply_update()
            counted.append(made._record.updates)
    assert counted == [1, 1] and made.weight_version == "v2"


def test_objects_are_looked_through_at_the_end_of_a_step(tmp_path, monkeypatch):
    of_config, parts = config(tmp_path, {"name": "a"}), Parts()
    monkeypatch.setattr(module, "collect", lambda: parts.events.append("collect"))
    monkeypatch.setattr(parts, "take_memory_stats", dict, raising=False)
    made = run_of(of_config, parts)
    # As on every rank but the first.
    made._logger = None
    with made.step(of_config.stages[0], 1):
        made.apply_update(1.0)
    assert parts.events == [("update", 1.0), "collect"]


def test_a_finished_step_is_logged_with_what_rollouts_measured_of_it(tmp_path, monkeypatch):
    of_config, parts = config(tmp_path, {"name": "a"}), Parts()
    monkeypatch.setattr(parts, "take_memory_stats", dict, raising=False)
    taken = lambda *place: {"servers/lost": 1.0, "gate/auroc": 0.5} if place == ("a", 1) else {}  # noqa: E731
    monkeypatch.setattr(parts, "take_metrics", taken, raising=False)
    made, logged = run_of(of_config, parts), []
    made._logger = SimpleNamespace(span=lambda *_: None, step_done=lambda *step: logged.append(step))
    with made.step(of_config.stages[0], 1) as metrics:
        metrics["loss"] = 2.0
    ((stage, step, found),) = logged
    assert (stage.name, step) == ("a", 1)
    assert found.keys() - {"seconds/step"} == {"loss", "servers/lost", "gate/auroc"}


def test_traces_of_a_step_are_given_to_the_trackers_with_their_problems(tmp_path):
    of_config, parts = config(tmp_path, {"name": "a"}), Parts(_sampled())
    made, shown = run_of(of_config, parts), []
    made._logger = SimpleNamespace(span=lambda *_: None, sampled=lambda *traces: shown.append(traces))
    made.graded_groups(of_config.stages[0], 1)
    assert shown == [(of_config.stages[0], 1, parts.sampled.groups, {})]


def test_a_gradient_that_is_not_finite_stops_the_run_once_and_is_then_left_out_without_a_new_version(tmp_path):
    parts = Parts()
    parts.norm = None
    (tmp_path / "run").mkdir()
    of_config = config(tmp_path / "run", {"name": "a"})
    with pytest.raises(RunStopped, match="in step 1 of a; the weights are unchanged"):
        run_of(of_config, parts).apply_update()
    again = run_of(of_config, parts)
    again._logger = SimpleNamespace(log=parts.events.append)
    assert again.apply_update()["update_skipped"] == 1.0
    assert again.weight_version == "v0"
    assert parts.events[-1] == "The gradient norm of update 1 is nan again; step 1 of a is skipped"


def test_the_reference_policy_scores_at_the_samples_temperature_and_by_its_server_where_there_is_one(tmp_path):
    parts, scorer = Parts(), Parts()
    made = run_of(config(tmp_path, {"name": "a"}), parts)
    made.ref_log_probs(["sample"], 0.7)
    assert parts.events == [("log-probs", (0.7,), {"ref_policy": True})]
    made._ref_scorer = scorer
    made.ref_log_probs(["sample"], 1.0)
    assert len(parts.events) == 1 and scorer.events == [("log-probs", (), {})]


def test_samples_and_those_that_the_reference_policy_scores_are_scattered_side_by_side(tmp_path):
    made = run_of(config(tmp_path, {"name": "a"}), Parts())
    sent = []
    made._scatter = SimpleNamespace(scatter=lambda batches: sent.extend(batches) or [f"{b} here" for b in batches])
    found = made.scattered(lambda: [("one", "one's ref"), ("two", "two's ref")])
    assert sent == ["one", "one's ref", "two", "two's ref"]
    assert found == [("one here", "one's ref here"), ("two here", "two's ref here")]


CUSTOM = {"name": "a", "kind": "my_code:Stage"}


class Counting:
    """In place of the hooks of the user's own stage: its state is how many groups it has learned from."""

    def __init__(self):
        self.learned = 0

    def learn(self, step, groups):
        self.learned += len(groups)
        return [["advantages"]], {"custom/learned": float(self.learned)}

    def state(self):
        return {"learned": self.learned}

    def load_state(self, state):
        self.learned = state["learned"]


def test_a_checkpoint_has_the_state_of_the_users_own_stage_and_a_resumed_run_continues_with_it(tmp_path, monkeypatch):
    (of_stage,) = (of_config := config(tmp_path, CUSTOM)).stages
    records, counting, parts = [], Counting(), Parts()
    monkeypatch.setattr(run_saves, "save_checkpoint", lambda root, policy, record, keep: records.append(record))
    parts.custom_stage = lambda stage: counting
    made = run_of(of_config, parts, RunProgress(step=4, updates=2))
    assert made.custom_advantages(of_stage, 4, ["one", "two"]) == [["advantages"]]
    assert made._record.counts == {"custom/learned": 2.0}
    made.checkpoint_if_due(of_stage, 4)
    assert RunProgress.from_dict(records[0]) == made._progress
    counting = Counting()
    monkeypatch.setattr(run_saves, "load_checkpoint", lambda path, policy: records[0])
    run_of(of_config, parts, RunProgress(step=3), "checkpoint-1").open_stage(of_stage)
    assert counting.learned == 2


def test_a_stage_of_the_users_own_writes_at_its_end_which_problems_it_kept_and_others_do_not(tmp_path):
    of_config, parts = config(tmp_path, CUSTOM, {"name": "b"}), Parts()
    parts.save_huggingface = lambda target: parts.events.append(f"model {target.name}")
    parts.custom_stage = lambda stage: f"hooks of {stage.name}"
    parts.write_kept = lambda stage, hooks: parts.events.append(f"kept {stage.name} by {hooks}")
    made = run_of(of_config, parts)
    for stage in of_config.stages:
        made.close_stage(stage)
    assert parts.events == ["kept a by hooks of a", "model a", "model b"]


@pytest.mark.parametrize(("learned", "written"), [(True, ["model a"]), (False, [])])
def test_a_model_that_is_there_is_written_again_only_where_this_process_has_learned(tmp_path, learned, written):
    of_config, parts = config(tmp_path, {"name": "a"}), Parts()
    parts.save_huggingface = lambda target: parts.events.append(f"model {target.name}")
    parts.take_memory_stats = parts.take_metrics = lambda *_: {}
    made = run_of(of_config, parts, RunProgress(step=3))
    (made._directory.models / "a").mkdir(parents=True)
    if learned:
        with made.step(of_config.stages[0], 4):
            pass
    made.close_stage(of_config.stages[0])
    assert parts.events == written


@pytest.fixture
def saved(monkeypatch):
    """Checkpoints that were written, among the events of the parts."""

    def save(root, policy, record, keep):
        policy.events.append(("save", record["step"], keep))

    monkeypatch.setattr(run_saves, "save_checkpoint", save)


def test_checkpoints_are_written_every_n_steps_and_after_the_last_and_the_log_is_pruned_only_afterwards(
    tmp_path, saved
):
    of_config = config(tmp_path, {"name": "a", "steps": 5}, checkpoint={"every_steps": 2, "keep": 3})
    parts = Parts()
    made = run_of(of_config, parts)
    for step in range(1, 6):
        made._progress = RunProgress(step=step)
        made.checkpoint_if_due(of_config.stages[0], step)
    due = [("save", step, 3) for step in (2, 4, 5)]
    assert parts.events == [event for _, step, keep in due for event in (("save", step, keep), ("prune", step))]


KEEPING = {"journal": {"trainer_log_probs": True, "keep_steps": 2}, "checkpoint": {"every_steps": 2, "keep": 1}}


def _keeping(tmp_path):
    """A run that keeps the trainer's log-probs, and a function that lets its loss see those of one trace."""
    parts = Parts()
    parts.world = SimpleNamespace(layout=SimpleNamespace(dp=1), dp_rank=0, tp_rank=0, cp_rank=0, last_stage=True)
    parts.take_memory_stats = parts.take_metrics = lambda *_: {}
    made = run_of(config(tmp_path, {"name": "a"}, **KEEPING), parts)

    def learn(log_prob):
        micro = pad([TrainSample((1, 2), (3,), place=(0, 0))], 3)
        made.recorded(lambda *_: (0.0, {}))(torch.full_like(micro.mask, log_prob), None, micro)

    return made, learn


def test_the_trainers_log_probs_of_a_step_are_on_disk_before_the_checkpoint_that_has_the_step(tmp_path, monkeypatch):
    made, learn = _keeping(tmp_path)
    (stage,), files = made.config.stages, TrainerLogProbFiles(tmp_path / "trainer_log_probs")
    there = []
    monkeypatch.setattr(run_saves, "save_checkpoint", lambda *_, **__: there.append(files.read("a", step) is not None))
    for step in range(1, 5):
        with made.step(stage, step):
            learn(-float(step))
        made.checkpoint_if_due(stage, step)
    assert there == [True, True]
    assert files.read("a", 4)[0, 0].tolist() == [-4.0]
    # journal.keep_steps
    assert [step for step in range(1, 5) if files.read("a", step)] == [3, 4]


def test_where_the_gap_stops_the_run_the_log_probs_that_show_it_are_on_disk(tmp_path):
    made, learn = _keeping(tmp_path)
    (stage,) = made.config.stages
    with pytest.raises(RunStopped, match="no update was made in this step"), made.step(stage, 1):
        learn(-3.0)
        made.check_update(stage, {"sampler_gap/mean": 7.0})
    assert TrainerLogProbFiles(tmp_path / "trainer_log_probs").read("a", 1)[0, 0].tolist() == [-3.0]


def test_a_run_that_does_not_ask_for_them_keeps_no_log_probs(tmp_path):
    made, objective = run_of(config(tmp_path, {"name": "a"}), Parts()), object()
    assert made.recorded(objective) is objective


def test_a_run_that_is_asked_to_stop_writes_one_first(tmp_path, saved):
    of_config, parts = config(tmp_path, {"name": "a"}, checkpoint={"every_steps": 10}), Parts()
    made = run_of(of_config, parts, RunProgress(step=2))
    made._coordinator.stop = True
    with pytest.raises(Preempted, match="after step 2 of a, with a checkpoint; continue with --resume"):
        made.checkpoint_if_due(of_config.stages[0], 2)
    assert parts.events == [("save", 2, 2), ("prune", 2)]
