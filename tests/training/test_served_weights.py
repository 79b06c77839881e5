"""When a step's traces are there, servers are asked for their weights, before anything is learned."""

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.scripted_run import OneRank, scripted_run

from exprl_megatron.config.load import load_config
from exprl_megatron.errors import ServerError, WeightsReplaced
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.serving.openai_endpoint import judge_endpoints
from exprl_megatron.serving.shared_judge import SharedJudgeClient
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.utils.ports import free_ports


def sampling_run(pool, events):
    """A run's part that gets a step's groups; `events` has what happened, in order."""
    rollouts = Rollouts.__new__(Rollouts)
    rollouts._pool, rollouts.problems = pool, SimpleNamespace(texts=lambda stage: {})
    phases = SimpleNamespace(switch_to_training=lambda: events.append("learn"))
    prefetch = SimpleNamespace(
        needs_weights=lambda *_: False,
        start=lambda *_: None,
        take=lambda *_: events.append("traces") or SampledStep([], 2, Counter()),
    )
    parts = {"rollouts": rollouts, "prefetch": prefetch}
    return scripted_run(coordinator=OneRank(), servers={"phases": phases}, rank_zero=parts)


STAGE = SimpleNamespace(name="sparse", max_staleness=0)


def test_servers_are_asked_once_a_step_between_its_traces_and_learning():
    events = []

    async def check_served():
        events.append("check")

    sampling_run(SimpleNamespace(check_served=check_served), events).graded_groups(STAGE, 1)
    assert events == ["traces", "check", "learn"]


def test_nothing_is_learned_where_no_server_has_our_weights_and_a_run_without_servers_has_none_to_ask():
    events = []

    async def check_served():
        raise WeightsReplaced("policy-0 serves others.")

    with pytest.raises(WeightsReplaced):
        sampling_run(SimpleNamespace(check_served=check_served), events).graded_groups(STAGE, 1)
    assert events == ["traces"]
    sampling_run(None, events).graded_groups(STAGE, 1)
    assert events == ["traces", "traces", "learn"]


@pytest.mark.parametrize(("place", "compared"), [("own", True), ("policy", False)])
def test_texts_of_samples_are_compared_with_their_ids(place, compared):
    """Servers that also judge may have another tokenizer's texts meanwhile."""
    config = load_config(Path("recipes/configs/demo.yaml"))
    pool = SimpleNamespace(text_check=None)
    judges = [] if place == "own" else [SharedJudgeClient(pool, Path("judge"), 0, 1.0)]
    Rollouts(config, None, pool, judges, None, None)
    assert (pool.text_check is not None) == compared


def test_what_a_judge_s_endpoint_lacks_is_in_the_run_s_log_while_the_run_waits_for_it():
    url = f"http://127.0.0.1:{free_ports(1)[0]}/v1"
    overrides = [f"judge.endpoints=[{url}]", "judge.server.start_deadline_s=0.1"]
    config = load_config(Path("recipes/configs/demo.yaml"), overrides)
    said: list[str] = []
    judging = SimpleNamespace(close=lambda: None)
    logger = SimpleNamespace(log=said.append)

    async def opened():
        rollouts = Rollouts(config, None, None, judge_endpoints(config.judge), judging, logger)
        try:
            await rollouts.open()
        finally:
            await rollouts.close()

    with pytest.raises(ServerError, match=rf"judge-0 \({url}\) was not ready within start_deadline_s \(0\.1 s\)"):
        asyncio.run(opened())
    assert [line.partition(" asked")[0] for line in said] == [f"waiting at most 0.1 s: judge-0 ({url}),"]
