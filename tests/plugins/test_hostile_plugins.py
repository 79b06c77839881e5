"""Whatever a function of the user returns or raises is a finding, an abstention, or one sentence with its file."""

import asyncio
import functools
import os
import threading
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exprl_megatron.algorithms.advantages import advantage_fn
from exprl_megatron.algorithms.surrogates import SurrogateBatch, custom_surrogate, surrogate
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.plugins.calling import Plugin
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.custom_functions import CustomFunction
from exprl_megatron.rollout.group import StepInfo
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.custom_metrics import checked_metrics, log_failures

PROBLEM = Problem("p", "What is 2 + 2?", answer="4")
REFERENCE = "forty two apples and seven pears"


def own(function, deadline_s=60.0):
    return CustomFunction(Plugin("verifier.domains.math", "mine:function", function), deadline_s)


def verdict(function, deadline_s=60.0):
    return asyncio.run(own(function, deadline_s).verify(PROBLEM, trace()))


def value(function):
    return asyncio.run(own(function).value(PROBLEM, trace()))


def trace():
    return Trace("p", 0, [1, 2], [3, 4], [-1.0, -2.0], "4", "stop", (("v0", 0, 2),))


class _Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class _NoNumber:
    def __float__(self):
        raise KeyError("x")


@pytest.mark.parametrize(
    "returned",
    [None, float("nan"), float("inf"), 10**400, 1j, _NoNumber(), "1.5", b"1", [1.0]],
    ids=["none", "nan", "inf", "large", "complex", "raises", "text", "bytes", "list"],
)
def test_a_term_that_is_not_a_finite_number_is_a_sentence_with_its_file(returned):
    with pytest.raises(PluginError, match=r"mine:function \(.*test_hostile_plugins.py, line \d+\) returned "):
        value(lambda problem, trace: returned)


@pytest.mark.parametrize("number", [torch.tensor(0.5), np.float32(0.5), 0.5])
def test_a_score_is_a_python_number_whatever_it_was(number):
    assert type(verdict(lambda problem, trace: Scored(number)).value) is float


@pytest.mark.parametrize("evidence", [None, b"bytes", 7, "half \ud800 character", "x" * 1_000_000])
def test_evidence_is_text_that_a_file_can_hold(evidence):
    for judgement in (Scored(0.5, evidence), Abstained("why", evidence)):
        found = verdict(lambda problem, trace, judgement=judgement: judgement).evidence
        assert found.encode() is not None and len(found) < 30_000


def test_a_verdict_of_the_users_has_no_hash_of_the_judgement_store():
    assert verdict(lambda problem, trace: Scored(0.5, "x", hash="0" * 64)).hash is None


@pytest.mark.parametrize("reason", [None, 3, "", REFERENCE, REFERENCE.replace(" ", "-"), "two words", "Ü"])
def test_a_reason_that_is_not_a_short_word_names_no_metric(reason):
    found = verdict(lambda problem, trace: Abstained(reason, "seen"))
    assert found.reason == "verifier-error" and REFERENCE not in found.evidence
    assert "test_hostile_plugins.py, line" in found.evidence


def test_a_short_reason_stays():
    assert verdict(lambda problem, trace: Abstained("unit-not-recognized", "inch")) == Abstained(
        "unit-not-recognized", "inch"
    )


async def _cancelled(problem, trace):
    raise asyncio.CancelledError


def _raising(error):
    def function(problem, trace):
        raise error

    return function


@pytest.mark.parametrize(
    "function",
    [
        _cancelled,
        _raising(StopIteration()),
        _raising(_Unspeakable()),
        _raising(KeyboardInterrupt()),
        _raising(GeneratorExit()),
        _raising(ValueError("long " * 10_000)),
        _raising(ValueError("half \ud800 character")),
    ],
)
def test_whatever_it_raises_is_an_abstention_with_its_line(function):
    found = verdict(function)
    assert found.reason == "verifier-error" and "test_hostile_plugins.py, line" in found.evidence
    assert len(found.evidence.encode()) < 2_000


def test_a_step_that_is_cancelled_ends_while_a_function_waits():
    async def waits(problem, trace):
        await asyncio.sleep(3600)

    async def step():
        task = asyncio.create_task(own(waits).verify(PROBLEM, trace()))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(step())


def test_a_child_that_a_function_forks_answers_nothing():
    def forks(problem, trace):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return Scored(1.0, "parent")

    assert verdict(forks) == Scored(1.0, "parent")


def test_what_a_function_does_to_a_traces_tokens_is_its_own_error():
    kept = trace()

    def changes(problem, trace):
        trace.token_ids[:] = 0
        return Scored(1.0)

    assert asyncio.run(own(changes).verify(PROBLEM, kept)).reason == "verifier-error"
    assert kept.token_ids.tolist() == [3, 4]


def _named(first, problem, trace):
    return "text"


def test_a_partial_and_a_decorated_function_are_named_where_they_are_defined():
    line = _named.__code__.co_firstlineno
    for function in (functools.partial(_named, 1), functools.partial(functools.partial(_named), 1)):
        with pytest.raises(PluginError, match=rf"test_hostile_plugins.py, line {line}\)"):
            verdict(function)

    @functools.wraps(_named)
    def decorated(problem, trace):
        return "text"

    with pytest.raises(PluginError, match=rf"test_hostile_plugins.py, line {line}\)"):
        verdict(decorated)


def test_a_loss_that_changes_what_it_reads_changes_only_copies():

    def spoils(batch: SurrogateBatch) -> torch.Tensor:
        loss = -batch.advantages.clone() * batch.log_probs
        for tensor in (batch.old_log_probs, batch.advantages, batch.mask):
            tensor.zero_()
        return loss

    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    micro = SimpleNamespace(advantages=torch.ones(1, 2), mask=torch.tensor([[1.0, 0.0]]))
    old = torch.full((1, 2), -1.5)
    load_plugin.cache_clear()
    config = SimpleNamespace(surrogate="hostile:spoils", clip_low=0.2, clip_high=0.2, dual_clip=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exprl_megatron.plugins.calling.load_plugin", lambda path: spoils)
        loss, _, _ = surrogate(config, log_probs, old, micro)
    assert loss.tolist() == [[1.0, 0.0]]
    assert (micro.advantages.tolist(), micro.mask.tolist()) == ([[1.0, 1.0]], [[1.0, 0.0]])
    assert old.tolist() == [[-1.5, -1.5]]


def loss_of(function, log_prob=-1.0):
    """What a loss of the user gives for one trace of two tokens, of which the last one is outside of the response."""
    log_probs = torch.tensor([[log_prob, -2.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0]])
    batch = SurrogateBatch(log_probs, log_probs.detach() - 0.5, mask.clone(), mask, 0.2, 0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exprl_megatron.algorithms.surrogates.Plugin.load", lambda key, path: Plugin(key, path, function))
        return custom_surrogate("mine:function", batch)


def test_a_loss_in_another_precision_is_taken_and_counts_inside_of_the_response_alone():
    assert loss_of(lambda batch: batch.log_probs.double() / batch.mask).tolist() == [[-1.0, 0.0]]
    assert loss_of(lambda batch: batch.log_probs.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda batch: batch.log_probs.mean(), r"a Tensor of the shape \(\) instead of a tensor of the shape \(1, 2\)"),
        (lambda batch: [batch.log_probs], "a list instead of"),
        (lambda batch: batch.log_probs * float("nan"), r"the loss nan for a token with log-probs -1 and -1.5 \(old\)"),
        (lambda batch: batch.log_probs / 0, "the loss -inf for a token"),
        (lambda batch: batch.log_probs.detach(), "a loss without a gradient"),
        (lambda batch: batch.log_probs.int(), "a loss without a gradient"),
        (lambda batch: batch.log_probs * 1j, "a loss of torch.complex64 on cpu instead of numbers on cpu"),
        (lambda batch: batch.log_probs.to("meta"), "a loss of torch.float32 on meta instead of numbers on cpu"),
    ],
)
def test_a_loss_that_is_no_finite_number_for_each_token_is_a_sentence_with_its_file(function, said):
    with pytest.raises(PluginError, match=rf"mine:function \(.*test_hostile_plugins.py, line \d+\) returned {said}"):
        loss_of(function)


def test_a_model_that_is_not_finite_is_no_fault_of_the_users_loss():
    assert loss_of(lambda batch: -batch.log_probs, float("nan"))[0, 0].isnan()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda scores, valid: scores.tolist(), "a list instead of a tensor of the shape"),
        (lambda scores, valid: scores.T, r"a Tensor of the shape \(2, 3\) instead of"),
        (lambda scores, valid: scores * 1j, "advantages of torch.complex128 on cpu instead of numbers on cpu"),
        (lambda scores, valid: scores.to("meta"), "advantages of torch.float64 on meta"),
        (
            lambda scores, valid: scores / scores,
            r"an advantage that is not finite for the scores \[0.5, 0.0\] of group 1",
        ),
    ],
)
def test_an_estimator_that_gives_no_finite_number_for_each_trace_is_a_sentence_with_its_file(
    monkeypatch, function, said
):
    monkeypatch.setattr(
        "exprl_megatron.algorithms.advantages.Plugin.load", lambda key, path: Plugin(key, path, function)
    )
    scores = torch.tensor([[1.0, 0.5], [0.5, 0.0], [1.0, 1.0]], dtype=torch.float64)
    with pytest.raises(PluginError, match=rf"mine:function \(.*test_hostile_plugins.py, line \d+\) returned {said}"):
        advantage_fn("mine:function")(scores, torch.ones_like(scores, dtype=torch.bool))


@pytest.mark.parametrize("value", [float("nan"), "1.5", b"1", None, 1j, 10**400, [1]])
def test_a_step_metric_that_is_no_number_is_a_sentence_with_its_file(value):
    plugin = Plugin("step_metrics.0", "mine:function", lambda step, groups: None)
    with pytest.raises(PluginError, match=r"test_hostile_plugins.py, line \d+\) returned 'share' as a .* not a number"):
        checked_metrics(plugin, {"share": value})


@pytest.mark.parametrize("name", ["reward/mean", "Loss", "", "a b", "x" * 61, 3, b"a", "../x"])
def test_a_step_metric_has_no_name_that_a_metric_of_the_run_has(name):
    plugin = Plugin("step_metrics.0", "mine:function", lambda step, groups: None)
    with pytest.raises(PluginError, match=r"returned the name .*; use at most 60 lower-case letters"):
        checked_metrics(plugin, {name: 1.0})
    assert checked_metrics(plugin, {"loss": 1}) == {"custom/loss": 1.0}


def test_an_entry_point_that_two_packages_have_is_refused_with_both(monkeypatch):
    points = EntryPoints(
        EntryPoint(name="mine", value=f"{package}:score", group="exprl_megatron.plugins") for package in ("one", "two")
    )
    monkeypatch.setattr("exprl_megatron.config.plugin_path.entry_points", lambda group: points)
    monkeypatch.setattr("exprl_megatron.plugins.loading.installed_plugins", lambda: {"mine": points["mine"]})
    load_plugin.cache_clear()
    with pytest.raises(PluginError, match=r"'mine' is in several packages \(one:score of \?, two:score of \?\)"):
        load_plugin("mine")


def test_step_metrics_that_never_return_are_left_out_and_the_run_continues():
    said, go_on = [], threading.Event()
    calls, called = [], threading.Event()

    def hangs(step, groups):
        calls.append(step)
        called.set()
        go_on.wait()
        return {"custom/late": 1.0}

    metrics = log_failures(hangs, said.append, deadline_s=0.01)
    assert [metrics(StepInfo("a", number), []) for number in (1, 2)] == [{}, {}]
    # Its thread may begin after the deadline.
    assert called.wait(120)
    go_on.set()
    assert len(calls) == 1
    assert said == ["step_metrics gave no result within 0.01 s and is not called again; the run continues."]
