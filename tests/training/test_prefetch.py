"""When steps are started, under which weights, and in which order they are learned from; without servers."""

import asyncio
import threading

import pytest
from helpers.graded import group, stage

from exprl_megatron.errors import ServerError
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.training.prefetch import RolloutPrefetch


class Loop:
    """The part of the coordinator that sampling ahead needs: an event loop in a thread."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def start(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine):
        return self.start(coroutine).result()

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Sampling:
    """Stands in for the rollouts: a step is sampled when the test says so."""

    def __init__(self, journal=()):
        self.journal = {step: self.result(step) for step in journal}
        self.started = {}
        self.may_finish = {step: threading.Event() for step in range(1, 20)}
        self.finished = {step: threading.Event() for step in range(1, 20)}
        self.fails = {}
        self.paused = []

    @staticmethod
    def result(step):
        return SampledStep([group(step / 100)], 4)

    def has_sampled(self, stage, step):
        return step in self.journal

    def read_logged(self, stage, step):
        return self.journal.get(step)

    async def collect(self, stage, step, prompts_consumed, versions):
        self.started[step] = (prompts_consumed, versions)
        await asyncio.to_thread(self.may_finish[step].wait, 20)
        if step in self.fails:
            raise self.fails[step]
        self.journal[step] = self.result(step)
        self.finished[step].set()
        return self.journal[step]

    async def pause_generation(self):
        self.paused.append(True)

    async def continue_generation(self):
        self.paused.append(False)

    def finish(self, *steps):
        for step in steps:
            self.may_finish[step].set()


@pytest.fixture
def coordinator():
    loop = Loop()
    yield loop
    loop.close()


def _stage(max_staleness, steps=6):
    correction = {"loss": {"correction": {"kind": "truncated"}}}
    return stage("sparse-rl", steps=steps, problems_per_step=4, max_staleness=max_staleness, **correction)


def _learn(prefetch, of_stage, step):
    """One step as the run takes it; its result, and whether the servers got weights."""
    version = f"v{step - 1}"
    wanted = prefetch.needs_weights(of_stage, step, version)
    prefetch.start(of_stage, step, 4 * (step - 1), version)
    return prefetch.take(of_stage, step), wanted


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_no_step_is_started_under_weights_older_than_allowed_and_none_later_than_possible(coordinator, max_staleness):
    sampling, steps = Sampling(), 6
    sampling.finish(*range(1, 20))
    prefetch = RolloutPrefetch(coordinator, sampling, pytest.fail)
    for step in range(1, steps + 1):
        sampled, _ = _learn(prefetch, _stage(max_staleness), step)
        assert sampled == sampling.result(step)
    oldest = {step: int(versions[0][1:]) for step, (_, versions) in sampling.started.items()}
    assert oldest == {step: max(0, step - 1 - max_staleness) for step in range(1, steps + 1)}


def test_steps_keep_their_problems_whatever_is_started_when(coordinator):
    sampling = Sampling()
    sampling.finish(*range(1, 20))
    prefetch = RolloutPrefetch(coordinator, sampling, pytest.fail)
    for step in range(1, 7):
        _learn(prefetch, _stage(2), step)
    assert {step: consumed for step, (consumed, _) in sampling.started.items()} == {s: 4 * (s - 1) for s in range(1, 7)}


def test_steps_are_learned_in_their_order_however_soon_later_ones_are_finished(coordinator):
    sampling = Sampling()
    prefetch = RolloutPrefetch(coordinator, sampling, pytest.fail)
    sampling.finish(2, 3)

    def first_is_last():
        if sampling.finished[2].wait(20) and sampling.finished[3].wait(20):
            sampling.finish(1)

    threading.Thread(target=first_is_last).start()
    learned = [_learn(prefetch, _stage(2, steps=3), step)[0] for step in (1, 2, 3)]
    assert learned == [sampling.result(step) for step in (1, 2, 3)]


def test_a_step_in_flight_may_continue_under_every_version_announced_meanwhile(coordinator):
    sampling = Sampling()
    prefetch = RolloutPrefetch(coordinator, sampling, pytest.fail)
    sampling.finish(1, 2)
    for step in (1, 2):
        _learn(prefetch, _stage(2), step)
    assert prefetch.needs_weights(_stage(2), 3, "v2")
    assert sampling.paused == [True, False, True, False, True], "held while the weights change, and no longer"
    assert sampling.started[3][1] == ["v0", "v1", "v2"]
    assert sampling.started[4][1] == ["v1", "v2"]
    sampling.finish(3, 4)


def test_strictly_on_policy_the_servers_get_every_version_and_one_step_at_a_time(coordinator):
    sampling = Sampling()
    sampling.finish(*range(1, 20))
    prefetch = RolloutPrefetch(coordinator, sampling, pytest.fail)
    for step in range(1, 4):
        assert _learn(prefetch, _stage(0), step)[1]
        assert sampling.started.keys() == set(range(1, step + 1))
    assert sampling.paused == []


def test_a_resumed_run_samples_what_its_journal_lacks_and_pushes_weights_only_for_that(coordinator):
    sampling = Sampling(journal=(1, 2, 4))
    sampling.finish(*range(1, 20))
    prefetch = RolloutPrefetch(coordinator, sampling, pytest.fail)
    needed = {step: _learn(prefetch, _stage(1, steps=5), step)[1] for step in range(1, 6)}
    assert {step: versions[0] for step, (_, versions) in sampling.started.items()} == {3: "v1", 5: "v3"}
    # before step 1 nothing is missing; the last step may have been finished before the last update
    assert [needed[step] for step in (1, 2, 4)] == [False, True, True]


def test_what_fails_ahead_is_reported_at_once_while_another_step_is_waited_for(coordinator):
    sampling, told = Sampling(), []
    heard = threading.Event()

    def on_failure(error):
        told.append(error)
        heard.set()

    sampling.fails[3] = ServerError("policy-0 died.")
    prefetch = RolloutPrefetch(coordinator, sampling, on_failure)
    sampling.finish(3)
    waiting = threading.Thread(target=_learn, args=(prefetch, _stage(2), 1))
    waiting.start()
    assert heard.wait(10), "the failure was kept until its step is asked for"
    assert told == [sampling.fails[3]] and waiting.is_alive()
    sampling.finish(1, 2)
    waiting.join()


def test_the_failure_of_the_step_that_is_waited_for_is_raised_there_alone(coordinator):
    sampling = Sampling()
    sampling.fails[1] = ServerError("policy-0 died.")
    prefetch = RolloutPrefetch(coordinator, sampling, pytest.fail)
    sampling.finish(1, 2)
    with pytest.raises(ServerError, match="policy-0 died"):
        _learn(prefetch, _stage(1), 1)


def test_with_over_sampling_the_next_steps_begin_behind_all_problems_that_are_drawn(coordinator):
    ahead = stage(
        "sparse-rl",
        problems_per_step=4,
        over_sampling=1.5,
        max_staleness=2,
        loss={"correction": {"kind": "truncated"}},
    )
    rollouts = Sampling()
    prefetch = RolloutPrefetch(coordinator, rollouts, lambda error: None)
    prefetch.start(ahead, 1, 10, "v0")
    rollouts.finish(1, 2, 3)
    assert prefetch.take(ahead, 1) == rollouts.result(1)
    for step in (2, 3):
        prefetch.take(ahead, step)
    assert {step: drawn for step, (drawn, _) in rollouts.started.items()} == {1: 10, 2: 16, 3: 22}
