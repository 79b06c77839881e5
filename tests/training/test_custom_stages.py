"""Stages of the user's own: what their hooks are given, what they may return, and what ends the run."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.graded import graded, group, stage
from helpers.scripted_rollouts import PROBLEMS, SECRET, Judging, drawn, rollouts

from exprl_megatron.algorithms.advantages import advantage_fn
from exprl_megatron.api import CustomStage, Group, LearnedTrace, PromptProblem, Scored
from exprl_megatron.config.problems import LeakGuardConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.problems.problem import Reference
from exprl_megatron.training.custom_stages import StageHooks, read_kept, write_kept
from exprl_megatron.training.run_problems import RunProblems


class Taking(CustomStage):
    """Calls what a test puts here in place of a hook."""

    on_learn = on_rollout = on_kept = on_state = None

    async def rollout(self, ctx):
        return await type(self).on_rollout(ctx)

    def learn(self, ctx, groups):
        return type(self).on_learn(ctx, groups)

    def kept_problems(self):
        return type(self).on_kept()

    def state_dict(self):
        return type(self).on_state()


class Plain(CustomStage):
    """Leaves everything as it is."""


class Awaiting(CustomStage):
    async def learn(self, ctx, groups):
        return ()


class Blocking(CustomStage):
    def rollout(self, ctx):
        return ()


class Short(CustomStage):
    def learn(self, ctx):
        return ()


class Strict(CustomStage):
    def __init__(self, settings):
        super().__init__(settings)
        self.keep = settings["keep"]


def elsewhere(settings):
    """No class."""


class NoStage:
    pass


def custom(cls="Taking", **changes):
    tree = {"name": "mine", "problems_per_step": 2, "group_size": 2}
    return stage(f"{__name__}:{cls}", **tree | changes)


def hooks(name="Taking", **changes) -> StageHooks:
    return StageHooks(custom(name, **changes), print)


def learn(monkeypatch, function, *groups, **changes):
    monkeypatch.setattr(Taking, "on_learn", staticmethod(function), raising=False)
    return hooks(**changes).learn(1, list(groups))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Awaiting", r"Awaiting.learn \(.*, line \d+\) must be `def`, not async"),
        ("Blocking", r"Blocking.rollout \(.*, line \d+\) must be `async def`"),
        ("Short", r"Short.learn \(.*, line \d+\) takes other arguments than \(self, ctx, groups\)"),
        ("Strict", r"Strict failed at .*test_custom_stages.py, line \d+, in __init__: KeyError: 'keep'"),
        ("elsewhere", "is a function that does not inherit from exprl_megatron.api.CustomStage"),
        ("NoStage", "is a class that does not inherit from exprl_megatron.api.CustomStage"),
        ("Nowhere", "defines no Nowhere"),
    ],
)
def test_a_class_that_cannot_be_a_stage_is_named_with_its_place(name, said):
    with pytest.raises(PluginError, match=rf"^kind of stage mine: .*{said}"):
        hooks(name)


def test_the_class_gets_its_settings():
    assert hooks("Strict", settings={"keep": 3})._instance.keep == 3


def test_a_stage_that_leaves_learning_as_it_is_learns_what_its_base_learns():
    groups = [group(1.0, 0.0, tokens=3), group(1.0, None, tokens=3)]
    rows, metrics = hooks("Plain", advantage="mean-centered").learn(1, groups)
    expected = advantage_fn("mean-centered")(
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double(), torch.tensor([[1, 1], [1, 0]]).bool()
    )
    assert metrics == {} and rows[1][1] is None
    found = [[None if row is None else row.tolist() for row in of_group] for of_group in rows]
    assert found[0] == [[v] * 3 for v in expected[0].tolist()] and found[1][0] == [expected[1][0].item()] * 3


def test_what_is_learned_has_its_own_advantages_by_trace_or_by_token(monkeypatch):
    one, other = group(1.0, 0.0, tokens=3), group(0.0, 0.5, tokens=2)

    def chosen(ctx, groups):
        ctx.log_metrics({"chosen": 2})
        assert (ctx.info.stage, ctx.info.step) == ("mine", 1)
        return [LearnedTrace(groups[0].samples[1].trace, -0.5), LearnedTrace(groups[1].samples[0].trace, [1.0, 2.0])]

    rows, metrics = learn(monkeypatch, chosen, one, other)
    assert metrics == {"custom/chosen": 2.0}
    assert rows[0][0] is None and rows[0][1].tolist() == [-0.5] * 3
    assert rows[1][0].tolist() == [1.0, 2.0] and rows[1][1] is None


def test_supervised_learning_has_no_advantages(monkeypatch):
    rows, _ = learn(monkeypatch, lambda ctx, groups: [first(groups)], group(1.0, 0.0), objective="supervised")
    assert rows[0][0].tolist() == [1.0] * 3 and rows[0][1] is None


def test_two_groups_of_a_problem_may_share_a_trace_that_is_alike(monkeypatch):
    alike = group(1.0, 0.0)
    groups = [alike, Group("p", (alike.samples[0], graded(1, 0.5)))]
    rows, _ = learn(
        monkeypatch, lambda ctx, groups: [LearnedTrace(g.samples[0].trace, i) for i, g in enumerate(groups)], *groups
    )
    assert [rows[0][0].tolist(), rows[1][0].tolist()] == [[0.0] * 3, [1.0] * 3]


def first(groups, *advantages):
    return LearnedTrace(groups[0].samples[0].trace, *advantages)


SUPERVISED = {"objective": "supervised"}
NOT_FINITE = "neither a finite number nor 3 finite numbers"
WRONG = [
    (lambda ctx, groups: 3, {}, "failed at .*TypeError: 'int' object is not iterable"),
    (lambda ctx, groups: [3], {}, "returned a int from learn instead of LearnedTrace"),
    (lambda ctx, groups: [LearnedTrace(graded(0, 1.0).trace, 1.0)], {}, "a trace of problem p that is not one of the"),
    (lambda ctx, groups: [first(groups, 1.0)] * 2, {}, "or that is there twice"),
    (lambda ctx, groups: [first(groups)], {}, "a trace without advantages"),
    (lambda ctx, groups: [first(groups, float("nan"))], {}, NOT_FINITE),
    (lambda ctx, groups: [first(groups, [1.0, 2.0])], {}, NOT_FINITE),
    (lambda ctx, groups: [first(groups, "much")], {}, NOT_FINITE),
    (lambda ctx, groups: [first(groups, "1.5")], {}, NOT_FINITE),
    (lambda ctx, groups: [first(groups, [b"1", b"2", b"3"])], {}, NOT_FINITE),
    (lambda ctx, groups: [first(groups, [1.0, 2.0, 1j])], {}, NOT_FINITE),
    (lambda ctx, groups: [first(groups, 1.0)], SUPERVISED, "leave them out"),
    (lambda ctx, groups: ctx.log_metrics({"A b": 1}), {}, "returned the name 'A b'"),
    (lambda ctx, groups: ctx.log_metrics({"a": "b"}), {}, "returned 'a' as a str that is not a number"),
    (lambda ctx, groups: ctx.default_learn(groups), SUPERVISED, "ValueError: objective is supervised"),
    (lambda ctx, groups: ctx.default_learn([groups[0], group(1.0)]), {}, "default_learn needs groups of one size"),
]


@pytest.mark.parametrize(("function", "changes", "said"), WRONG)
def test_what_learn_must_not_return_is_named(monkeypatch, function, changes, said):
    with pytest.raises(PluginError, match=rf"^kind of stage mine: .*:Taking .*{said}"):
        learn(monkeypatch, function, group(1.0, 0.0), **changes)


class GradingByPart(Judging):
    """Answers the user's own questions too."""

    async def judgement_of(self, problem, trace, by):
        self.events.append(f"{by} {problem.id}")
        return Scored(0.5)


def sampled(monkeypatch, function, first=0, **changes):
    """The step of a stage whose `rollout` is `function`, and what happened."""
    monkeypatch.setattr(Taking, "on_rollout", staticmethod(function), raising=False)
    of_stage, events = custom(**changes), []
    made = rollouts(of_stage, events, judging=GradingByPart(events), custom={"mine": StageHooks(of_stage, print)})
    texts = {}

    def custom_prompt(of_stage, problem_id, text):
        texts[100 + len(texts)] = text
        return (99 + len(texts),)

    made.problems.custom_prompt = custom_prompt
    made.sampler._tokenizer.decode = lambda ids: texts.get(ids[0]) or PROBLEMS[ids[0]].text
    return asyncio.run(made.collect(of_stage, 1, first, ["v0"])), events


def test_the_base_samples_where_the_class_does_not():
    of_stage, events = custom("Plain"), []
    made = rollouts(of_stage, events, custom={"mine": StageHooks(of_stage, print)})
    step = asyncio.run(made.collect(of_stage, 1, 4, ["v0"]))
    assert [found.problem_id for found in step.groups] == drawn(of_stage, 4, 2) and step.prompts_consumed == 2


def test_a_stage_samples_the_problems_that_come_next_and_the_next_step_those_after_them(monkeypatch):
    seen = []

    async def rollout(ctx):
        seen.append([problem.id for problem in ctx.next_problems(3)])
        seen.append([problem.id for problem in ctx.next_problems()])
        chosen = [problem for problem in ctx.problems if problem.id in seen[0]]
        return await ctx.sample(chosen, group_size=1)

    step, events = sampled(monkeypatch, rollout, first=2)
    assert seen == [drawn(custom(), 2, 3), drawn(custom(), 5, 2)]
    assert step.prompts_consumed == 5 and sorted(g.problem_id for g in step.groups) == sorted(seen[0])
    assert [len(found.samples) for found in step.groups] == [1, 1, 1]
    assert events[0] == "gate 1" and events[-2:] == ["abstentions 1", "log 1"]


def test_traces_may_be_judged_again_and_groups_changed(monkeypatch):
    async def rollout(ctx):
        (found,) = await ctx.sample(ctx.problems[:1])
        verdicts = [await ctx.judge(sample.trace) for sample in found.samples]
        assert await ctx.verify(found.samples[0].trace) == Scored(0.5)
        return [
            replace(found, samples=tuple(replace(s, judgement=v) for s, v in zip(found.samples, verdicts, strict=True)))
        ]

    step, events = sampled(monkeypatch, rollout)
    assert step.groups[0].scores == [0.5, 0.5]
    assert Counter(events)["judge p0"] == 2 and "verifier p0" in events


def test_two_samples_of_a_problem_in_a_step_have_other_seeds(monkeypatch):
    async def rollout(ctx):
        return [*await ctx.sample(ctx.problems[:1]), *await ctx.sample(ctx.problems[:1])]

    step, _ = sampled(monkeypatch, rollout)
    assert [found.problem_id for found in step.groups] == ["p0", "p0"]


def test_the_problems_of_a_stage_are_listed_once_in_a_step_however_often_it_samples(monkeypatch):
    listed = []
    shown = RunProblems.shown
    monkeypatch.setattr(RunProblems, "shown", lambda *a: listed.append(a) or shown(*a))

    async def rollout(ctx):
        return [group for problem in ctx.problems for group in await ctx.sample([problem], group_size=1)]

    sampled(monkeypatch, rollout)
    assert len(listed) == 1


async def _empty(ctx):
    return []


async def _unsampled(ctx):
    return [group(1.0, 0.0)]


async def _twice(ctx):
    return 2 * await ctx.sample(ctx.problems[:1])


async def _renamed(ctx):
    (found,) = await ctx.sample(ctx.problems[:1])
    return [replace(found, problem_id="p1")]


async def _unjudged(ctx):
    (found,) = await ctx.sample(ctx.problems[:1])
    return [Group("p0", tuple(replace(sample, judgement=1.0) for sample in found.samples))]


async def _unknown(ctx):
    return await ctx.sample([PromptProblem("p77", "What?")])


async def _none(ctx):
    return await ctx.sample([])


async def _no_traces(ctx):
    return await ctx.sample(ctx.problems[:1], group_size=0)


async def _no_text(ctx):
    return await ctx.sample(ctx.problems[:1], prompt=lambda problem: None)


async def _others(ctx):
    return await ctx.verify(graded(0, 1.0).trace)


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        (_empty, "returned a list from rollout instead of at least one Group"),
        (_unsampled, "a group of problem p with a trace that was not sampled for it"),
        (_twice, "or that is there twice"),
        (_renamed, "a group of problem p1 with a trace that was not sampled for it"),
        (_unjudged, "returned from rollout a float as a judgement"),
        (_unknown, "line .* in _unknown: ValueError: the stage has no problem 'p77' to sample"),
        (_none, "in _none: ValueError: sample was given no problem"),
        (_no_traces, "in _no_traces: ValueError: group_size is 0"),
        (_no_text, "in _no_text: ValueError: the prompt of problem p0 is a NoneType; return text"),
        (_others, "in _others: ValueError: the trace was not sampled in this step"),
    ],
)
def test_what_rollout_must_not_do_is_named_and_nothing_is_logged(monkeypatch, rollout, said):
    with pytest.raises(PluginError, match=rf"^kind of stage mine: .*:Taking .*{said}"):
        sampled(monkeypatch, rollout)


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_a_reference_of_any_problem_in_a_prompt_stops_the_run_whatever_the_code_does_with_the_error(
    monkeypatch, place, caught
):
    """All problems of the scripted rollouts have the same reference."""

    async def rollout(ctx):
        problems = ctx.problems[:2]
        hint = {problems[place].id: f"Hint: {SECRET.upper()}!"}
        try:
            return await ctx.sample(problems, prompt=lambda problem: problem.statement + hint.get(problem.id, ""))
        except Exception:
            if not caught:
                raise
        return await ctx.sample(problems)

    with pytest.raises(RunStopped, match="Leak guard: a request to the policy for problem p"):
        sampled(monkeypatch, rollout)


@pytest.mark.parametrize(("leaks", "said"), [(True, "with the reference of problem p5"), (False, None)])
def test_the_reference_of_a_problem_that_is_not_sampled_is_not_a_hint_either(monkeypatch, leaks, said):
    """What the problem's own statement has is none."""
    words = SECRET if leaks else "What is 0?"
    made_by = rollouts

    def with_one_reference(*arguments, **named):
        made = made_by(*arguments, **named)
        others = [replace(problem, reference=Reference("x")) for problem in PROBLEMS[:5]]
        guard = LeakGuard(LeakGuardConfig(), [*others, PROBLEMS[5]])
        made.problems.guards = dict.fromkeys(made.problems.guards, guard)
        return made

    async def rollout(ctx):
        return await ctx.sample(ctx.problems[:1], prompt=lambda problem: f"{problem.statement} {words}")

    monkeypatch.setitem(globals(), "rollouts", with_one_reference)
    if said is None:
        assert len(sampled(monkeypatch, rollout)[0].groups) == 1
        return
    with pytest.raises(RunStopped, match="for problem p0 shares a run of") as found:
        sampled(monkeypatch, rollout)
    assert said.removeprefix("with the ") in str(found.value) and SECRET not in str(found.value)


def test_prompts_of_the_users_own_are_sent_in_place_of_the_problems(monkeypatch):
    async def rollout(ctx):
        return await ctx.sample(ctx.problems[1:2], prompt=lambda problem: f"{problem.statement} Again.")

    step, events = sampled(monkeypatch, rollout)
    assert [s.trace.prompt_ids.tolist() for s in step.groups[0].samples] == [[100], [100]]
    assert "grade p1" in events


def test_kept_problems_are_in_the_order_of_the_set_and_known(monkeypatch):
    monkeypatch.setattr(Taking, "on_kept", staticmethod(lambda: {"c", "a"}))
    assert hooks().kept_problems(["a", "b", "c"]) == ["a", "c"]
    monkeypatch.setattr(Taking, "on_kept", staticmethod(lambda: ["a", "x"]))
    with pytest.raises(PluginError, match="kept the problem 'x', which the stage's `problems` do not have"):
        hooks().kept_problems(["a", "b", "c"])
    assert hooks("Plain").kept_problems(["a"]) is None


def test_a_later_stage_draws_from_what_was_kept_alone(tmp_path):
    later = custom("Plain", name="later", problems_per_step=4)
    # The config's check wants the stage that keeps; it is not run here.
    later = later.model_copy(update={"problems_from": "mine"})
    made = rollouts(later, [], custom={"later": StageHooks(later, print)})
    made.problems._kept = tmp_path
    with pytest.raises(UserError, match="Stage mine kept no problem"):
        asyncio.run(made.collect(later, 1, 0, ["v0"]))
    write_kept(tmp_path, "mine", ["p1", "p4", "elsewhere"])
    assert read_kept(tmp_path, "mine") == {"p1", "p4", "elsewhere"}
    step = asyncio.run(made.collect(later, 1, 0, ["v0"]))
    assert Counter(found.problem_id for found in step.groups) == {"p1": 2, "p4": 2}


def test_a_later_stage_without_any_kept_problem_says_so(tmp_path):
    later = custom("Plain", name="later").model_copy(update={"problems_from": "mine"})
    made = rollouts(later, [], custom={"later": StageHooks(later, print)})
    made.problems._kept = tmp_path
    write_kept(tmp_path, "mine", ["elsewhere"])
    with pytest.raises(UserError, match="Stage later has none of the problems that stage mine kept"):
        asyncio.run(made.collect(later, 1, 0, ["v0"]))


@pytest.mark.parametrize("state", [{"a": {1: 2}}, {"a": (1, 2)}, [1], {"a": float("nan")}, {"a": {1}}])
def test_a_state_that_json_would_change_is_refused(monkeypatch, state):
    monkeypatch.setattr(Taking, "on_state", staticmethod(lambda: state))
    with pytest.raises(PluginError, match="has a state_dict that JSON does not keep as it is"):
        hooks().state()


def test_a_state_is_what_the_class_gives(monkeypatch):
    monkeypatch.setattr(Taking, "on_state", staticmethod(lambda: {"a": [1, {"b": 0.5}]}))
    assert hooks().state() == {"a": [1, {"b": 0.5}]}
