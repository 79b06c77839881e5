"""One step of Rollouts on servers that are written out: what is checked before a request leaves, and what is logged."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from helpers.graded import stage
from helpers.scripted_rollouts import CANARY, SECRET, Judging, Servers, drawn, rollouts, sparse

from exprl_megatron.errors import RunStopped
from exprl_megatron.training.graded_sampling import SamplePlan
from exprl_megatron.training.rollouts import Rollouts


def asked(events):
    return [event for event in events if event.startswith(("read", "ask"))]


@pytest.mark.parametrize("by_groups", [False, True])
@pytest.mark.parametrize("text", [f"Hint: {SECRET}", f"seen {CANARY.upper()} before"])
@pytest.mark.parametrize("place", [0, 1])
def test_one_leaking_prompt_of_a_step_stops_the_run_before_anything_is_sent(text, place, by_groups):
    of_stage, events = sparse(), []
    leaking = int(drawn(of_stage, 0, 2)[place][1:])
    made = rollouts(of_stage, events, prompts={leaking: text}, by_groups=by_groups)
    with pytest.raises(RunStopped, match=f"Leak guard: a request to the policy for problem p{leaking} "):
        asyncio.run(made.collect(of_stage, 1, 0, ["v0"]))
    assert asked(events) == [] and made._journal.written == {}


def test_an_evaluations_leaking_prompt_is_not_sent_either():
    of_stage, events = sparse(), []
    made = rollouts(of_stage, events, prompts={4: SECRET})
    plan = SamplePlan(("evaluation", 0), of_stage.problems, range(6), 1, of_stage.sampling, ["v0"])
    with pytest.raises(RunStopped, match="problem p4 "):
        asyncio.run(made.sampler.sample(plan, made._judging.grade(of_stage, None)))
    assert asked(events) == []


def test_a_trace_that_holds_the_canary_stops_the_run_before_it_is_graded():
    of_stage, events = sparse(), []
    made = rollouts(of_stage, events, servers=Servers(events, says=f"as in {CANARY}"))
    with pytest.raises(RunStopped, match="a trace of problem p"):
        asyncio.run(made.collect(of_stage, 1, 0, ["v0"]))
    assert [event for event in events if event.startswith("grade")] == [] and made._journal.written == {}


def test_the_gate_comes_before_any_request_and_the_log_after_the_check_of_abstentions():
    of_stage, events = sparse(), []
    made = rollouts(of_stage, events)
    sampled = asyncio.run(made.collect(of_stage, 4, 0, ["v0"]))
    assert events[0] == "gate 4" and events[-2:] == ["abstentions 4", "log 4"]
    assert made._journal.written == {(of_stage.name, 4): sampled}


@pytest.mark.parametrize("refuses", ["gate", "abstentions"])
def test_a_refused_step_is_not_in_the_log(refuses):
    of_stage, events = sparse(), []
    made = rollouts(of_stage, events, judging=Judging(events, refuses=(refuses,)))
    with pytest.raises(RunStopped):
        asyncio.run(made.collect(of_stage, 1, 0, ["v0"]))
    assert made._journal.written == {}
    assert bool(asked(events)) == (refuses == "abstentions"), "a failing gate stops before the first request"


def test_groups_are_in_the_order_of_the_problems_whichever_is_finished_first():
    of_stage, events = sparse(problems_per_step=4), []
    first = int(drawn(of_stage, 0, 4)[0][1:])
    made = rollouts(of_stage, events, servers=Servers(events, slow={first: 50}))
    sampled = asyncio.run(made.collect(of_stage, 1, 0, ["v0"]))
    assert [group.problem_id for group in sampled.groups] == drawn(of_stage, 0, 4)
    assert [[sample.trace.sample for sample in group.samples] for group in sampled.groups] == [[0, 1]] * 4
    assert all(sample.trace.problem_id == group.problem_id for group in sampled.groups for sample in group.samples)


def test_a_step_takes_the_problems_after_those_of_earlier_steps_and_says_how_many():
    of_stage, events = sparse(), []
    made = rollouts(of_stage, events)
    sampled = asyncio.run(made.collect(of_stage, 3, 4, ["v0"]))
    assert [group.problem_id for group in sampled.groups] == drawn(of_stage, 4, 2)
    assert sampled.prompts_consumed == 2
    assert sampled.judge_counts == {"asked": events.count("grade p0")}


def test_groups_without_variance_are_replaced_by_the_next_problems_which_count_as_consumed():
    of_stage, events = sparse(dynamic_sampling=2), []
    one, two, three, four = drawn(of_stage, 1, 4)
    right = {one: (1.0, 1.0), three: (0.0, 0.0)}
    made = rollouts(of_stage, events, judging=Judging(events, right))
    sampled = asyncio.run(made.collect(of_stage, 1, 1, ["v0"]))
    # First `one` and `two`; `one` is replaced by `three`, and that by `four`.
    assert [group.problem_id for group in sampled.groups] == [two, four]
    assert sampled.prompts_consumed == 4


def test_where_no_round_is_left_groups_without_variance_fill_the_step():
    of_stage, events = sparse(dynamic_sampling=1), []
    one, two, three = drawn(of_stage, 0, 3)
    judging = Judging(events, {one: (1.0, 1.0), three: (0.0, 0.0)})
    sampled = asyncio.run(rollouts(of_stage, events, judging=judging).collect(of_stage, 1, 0, ["v0"]))
    assert [group.problem_id for group in sampled.groups] == [two, one]
    assert sampled.prompts_consumed == 3


def test_sampling_ends_when_enough_groups_are_finished_and_the_drawn_ones_are_all_consumed():
    of_stage, events = sparse(over_sampling=2.0), []
    slow = {int(name[1:]): 10**6 for name in drawn(of_stage, 0, 4)[:2]}
    made = rollouts(of_stage, events, servers=Servers(events, slow=slow))
    sampled = asyncio.run(made.collect(of_stage, 1, 0, ["v0"]))
    assert [group.problem_id for group in sampled.groups] == drawn(of_stage, 0, 4)[2:]
    assert sampled.prompts_consumed == 4


@pytest.mark.parametrize("versions", [["v1"], ["v1", "v2"]])
def test_a_trace_of_weights_that_are_not_allowed_is_refused(versions):
    of_stage, events = sparse(), []
    with pytest.raises(Exception, match=r"under weight version v0, not v1"):
        asyncio.run(rollouts(of_stage, events).collect(of_stage, 1, 0, versions))


def test_the_policys_servers_judge_after_all_sampling_once_they_have_the_judges_weights():
    of_stage, events = stage("exprl-outcome", problems_per_step=2, group_size=2), []
    made = rollouts(of_stage, events, shared_judge=True)
    sampled = asyncio.run(made.collect(of_stage, 1, 0, ["v0"]))
    counted = Counter(event.split()[0] for event in events)
    assert (counted["ask"], counted["grade"]) == (4, 4)
    weights = events.index("judge's weights")
    assert all(event.startswith(("gate", "read", "ask")) for event in events[:weights])
    assert all(not event.startswith(("read", "ask")) for event in events[weights:])
    assert [group.scores for group in sampled.groups] == [[1.0, 0.0]] * 2


def test_with_servers_of_its_own_the_judge_grades_while_others_are_sampled():
    of_stage, events = stage("exprl-outcome", problems_per_step=2, group_size=2), []
    slow = int(drawn(of_stage, 0, 2)[0][1:])
    made = rollouts(of_stage, events, servers=Servers(events, slow={slow: 100}))
    asyncio.run(made.collect(of_stage, 1, 0, ["v0"]))
    assert "judge's weights" not in events
    assert events.index(f"grade p{int(drawn(of_stage, 0, 2)[1][1:])}") < events.index(f"grade p{slow}")


def test_the_gate_the_servers_and_the_loop_have_metrics_of_a_step():
    rollouts = Rollouts.__new__(Rollouts)
    rollouts._pool = SimpleNamespace(take_metrics=lambda: {"servers/serving": 2.0})
    rollouts.loop_lag = SimpleNamespace(take=lambda: 0.25)
    gate = {("prime", 3): {"gate/auroc": 0.9}}
    rollouts._judging = SimpleNamespace(take_gate_metrics=lambda *place: gate.get(place, {}))
    assert rollouts.take_metrics("prime", 3) == {"servers/serving": 2.0, "loop/lag_max_s": 0.25, "gate/auroc": 0.9}
    rollouts._pool = None
    assert rollouts.take_metrics("prime", 4) == {"loop/lag_max_s": 0.25}
