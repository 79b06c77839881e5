"""training/loop.py on a run that is scripted: which numbers go to which call, and in which order."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.graded import graded, stage

from exprl_megatron.rollout.group import Group
from exprl_megatron.training import loop

TEACHER = {"p": (7, 8), "q": (9,)}
METRICS = {"loss": 0.0}


class Recorder:
    """In place of a run and its policy: keeps every call, and answers with numbers that say where they are from."""

    def __init__(self, groups=(), only=None):
        self.calls = []
        self.groups = list(groups)
        self.policy = self
        self.config = SimpleNamespace(debug=SimpleNamespace(only=only))
        self.teacher_prompts = TEACHER
        self.weight_version = "v0"

    def clock(self, name):
        return nullcontext()

    def graded_groups(self, stage, step):
        self.calls.append(("sample", step))
        return self.groups

    def on_rank0(self, work):
        return work()

    def custom_advantages(self, stage, step, groups):
        self.calls.append(("custom", step, [group.problem_id for group in groups]))
        return self.advantages

    def custom_metrics(self, stage, step, groups):
        return {"custom/groups": len(groups)}

    def scattered(self, batches):
        return batches()

    def ref_log_probs(self, samples, temperature):
        self.calls.append(("ref", _prompts(samples), temperature))
        return [np.full(s.response_tokens, -2.0 - i, np.float32) for i, s in enumerate(samples)]

    def log_probs(self, samples, temperature):
        self.calls.append(("old", _prompts(samples), temperature))
        return [np.full(s.response_tokens, -1.0 - i, np.float32) for i, s in enumerate(samples)]

    def accumulate(self, samples, objective, temperature, *, denominator):
        self.calls.append(("accumulate", list(samples), temperature, denominator))
        return dict(METRICS)

    def recorded(self, objective):
        self.calls.append(("recorded", objective))
        return objective

    def check_update(self, stage, metrics):
        self.calls.append(("check", metrics["tokens"]))

    def apply_update(self, gradient_scale=1.0):
        self.calls.append(("apply", gradient_scale))
        return {"grad_norm": 1.0}

    def named(self, name):
        return [call for call in self.calls if call[0] == name]


def _prompts(samples):
    return [tuple(s.prompt_ids.tolist()) for s in samples]


def _groups():
    """Two problems of two traces each: 3 and 5 tokens, and 2 and 4."""
    one = Group("p", (graded(0, 1.0, tokens=3), graded(1, 0.0, tokens=5)))
    other = Group("q", (graded(0, 0.0, tokens=2), graded(1, 1.0, tokens=4)))
    return [one, other]


def _stage(kind="sparse-rl", aggregation="token-mean", kl=0.0, **changes):
    tree = {"sampling": {"max_new_tokens": 16, "temperature": 0.7}, "group_size": 2, "problems_per_step": 2}
    lossless = kind == "self-distill" or changes.get("objective") == "supervised"
    loss = {} if lossless else {"loss": {"aggregation": aggregation, "kl_coefficient": kl}}
    return stage(kind, **tree | loss | changes)


@pytest.mark.parametrize(
    ("aggregation", "denominator"), [("token-mean", 14), ("sequence-mean", 4), ("constant-length", 4 * 16)]
)
def test_a_step_is_divided_by_all_its_samples_and_not_by_those_of_one_call(aggregation, denominator):
    run = Recorder(_groups())
    loop.rl_step(run, _stage(aggregation=aggregation), 1)
    ((_, samples, temperature, divisor),) = run.named("accumulate")
    assert len(samples) == 4 and (temperature, divisor) == (0.7, denominator)
    assert run.named("apply") == [("apply", 1.0)]


def test_each_of_several_updates_has_its_own_denominator():
    run = Recorder(_groups())
    loop.rl_step(run, _stage(updates_per_step=2), 1)
    assert [divisor for *_, divisor in run.named("accumulate")] == [8, 6]
    assert [tokens for _, tokens in run.named("check")] == [8, 6]


def test_old_log_probs_are_computed_for_all_updates_before_the_first_changes_the_weights():
    run = Recorder(_groups())
    loop.rl_step(run, _stage(updates_per_step=2), 1)
    step = ["recorded", "accumulate", "check", "apply"]
    assert [call[0] for call in run.calls] == ["sample", "old", "old", *step * 2]
    assert {temperature for *_, temperature in run.named("old")} == {0.7}
    for _, samples, *_ in run.named("accumulate"):
        assert [set(s.old_log_probs.tolist()) for s in samples] == [{-1.0}, {-2.0}]


def test_one_update_needs_no_old_log_probs():
    run = Recorder(_groups())
    loop.rl_step(run, _stage(), 1)
    assert run.named("old") == []
    assert all(s.old_log_probs is None for _, samples, *_ in run.named("accumulate") for s in samples)


def test_with_a_kl_term_every_sample_has_the_reference_policys_log_probs_at_the_stages_temperature():
    run = Recorder(_groups())
    loop.rl_step(run, _stage(kl=0.1), 1)
    assert run.named("ref") == [("ref", [(1,)] * 4, 0.7)]
    ((_, samples, *_),) = run.named("accumulate")
    assert [s.ref_log_probs.tolist() for s in samples] == [[-2.0] * 3, [-3.0] * 5, [-4.0] * 2, [-5.0] * 4]
    assert all(s.old_log_probs is None for s in samples)


def test_without_a_kl_term_the_reference_policy_is_not_asked():
    run = Recorder(_groups())
    loop.rl_step(run, _stage(kl=0.0), 1)
    assert run.named("ref") == []


def test_the_teacher_reads_its_own_prompts_and_the_student_learns_behind_its_own():
    run = Recorder(_groups())
    loop.rl_step(run, _stage("self-distill", teacher_prompt={"user": "{problem}{reference}"}), 1)
    assert run.named("ref") == [("ref", [(7, 8), (7, 8), (9,), (9,)], 0.7)]
    ((_, samples, *_),) = run.named("accumulate")
    assert _prompts(samples) == [(1,)] * 4
    assert [s.ref_log_probs[0] for s in samples] == [-2.0, -3.0, -4.0, -5.0]


def test_an_update_whose_traces_are_all_out_of_the_loss_is_left_out():
    groups = [_groups()[0], Group("q", (graded(0, None), graded(1, None)))]
    run = Recorder(groups)
    loop.rl_step(run, _stage(updates_per_step=2), 1)
    assert [divisor for *_, divisor in run.named("accumulate")] == [8]
    assert len(run.named("apply")) == 1


def test_a_run_that_only_samples_learns_nothing():
    run = Recorder(_groups(), only="sampling")
    metrics = loop.rl_step(run, _stage(), 1)
    assert [call[0] for call in run.calls] == ["sample"]
    assert metrics["reward/mean"] == 0.5


def test_what_the_check_refuses_is_not_applied():
    run = Recorder(_groups())
    run.check_update = lambda stage, metrics: (_ for _ in ()).throw(RuntimeError("too far apart"))
    with pytest.raises(RuntimeError, match="too far apart"):
        loop.rl_step(run, _stage(), 1)
    assert run.named("apply") == []


def test_supervised_learning_divides_by_the_tokens_of_the_batch_at_temperature_1():
    batch = [SimpleNamespace(response_tokens=3), SimpleNamespace(response_tokens=4)]
    run = Recorder()
    run.sft_batch = lambda stage, step: batch
    assert loop.sft_step(run, SimpleNamespace(), 2)["tokens"] == 7
    assert run.named("accumulate") == [("accumulate", batch, 1.0, 7)]
    assert run.named("apply") == [("apply", 1.0)]


def _custom(**changes):
    return _stage("my_code:Stage", **changes)


def test_a_stage_of_the_users_own_learns_what_it_chooses():
    run = Recorder(_groups())
    run.advantages = [[None, np.full(5, 0.25, np.float32)], [np.full(2, -1.0, np.float32), None]]
    loop.rl_step(run, _custom(), 4)
    assert run.named("custom") == [("custom", 4, ["p", "q"])]
    ((_, samples, temperature, divisor),) = run.named("accumulate")
    assert [s.advantages.tolist() for s in samples] == [[0.25] * 5, [-1.0] * 2]
    assert (temperature, divisor) == (0.7, 7) and run.named("check") == [("check", 7)]
    assert [s.place for s in samples] == [(0, 1), (1, 0)]


def test_a_stage_of_the_users_own_that_learns_nothing_takes_no_update():
    run = Recorder(_groups())
    run.advantages = [[None, None], [None, None]]
    metrics = loop.rl_step(run, _custom(), 1)
    assert run.named("accumulate") == run.named("apply") == [] and metrics["reward/mean"] == 0.5


def test_a_supervised_stage_of_the_users_own_maximizes_likelihood_without_old_or_reference_log_probs():
    run = Recorder(_groups())
    run.advantages = [[np.ones(3, np.float32), None], [None, np.ones(4, np.float32)]]
    loop.rl_step(run, _custom(objective="supervised", updates_per_step=2), 1)
    assert [(len(samples), *rest) for _, samples, *rest in run.named("accumulate")] == [(1, 1.0, 3), (1, 1.0, 4)]
    assert [call[0] for call in run.calls] == ["sample", "custom", "accumulate", "apply", "accumulate", "apply"]


class Stages:
    """A run of two stages, of which the first was started before; writes down what the loop asks for."""

    def __init__(self):
        self.events = []

    def remaining_stages(self):
        yield from (SimpleNamespace(name="a"), SimpleNamespace(name="b"))

    def remaining_steps(self, stage):
        return range(2, 4) if stage.name == "a" else range(1, 2)

    def step(self, stage, step):
        self.events.append(f"step {stage.name}{step}")
        return nullcontext({})

    def evaluate(self, stage=None, step=None):
        self.events.append("evaluate " + ("start" if stage is None else f"{stage.name}{'' if step is None else step}"))

    def open_stage(self, stage):
        self.events.append(f"open {stage.name}")

    def checkpoint_if_due(self, stage, step):
        self.events.append(f"save {stage.name}{step}")

    def close_stage(self, stage):
        self.events.append(f"close {stage.name}")


def test_every_step_is_evaluated_before_it_and_saved_after_it_and_a_stage_is_closed_before_its_evaluation(monkeypatch):
    monkeypatch.setattr(loop, "rl_step", lambda run, stage, step: run.events.append(f"learn {stage.name}{step}") or {})
    run = Stages()
    loop.run_stages(run)
    assert run.events == [
        *("evaluate start", "open a"),
        *("evaluate a1", "step a2", "learn a2", "save a2"),
        *("evaluate a2", "step a3", "learn a3", "save a3"),
        *("close a", "evaluate a", "open b"),
        *("evaluate b0", "step b1", "learn b1", "save b1", "close b", "evaluate b"),
    ]
