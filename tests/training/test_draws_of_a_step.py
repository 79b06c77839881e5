"""A step that draws a problem more than once, in one round or in several, samples it differently each time; its
prompts are decoded and checked in another thread than the event loop's."""

import asyncio
import threading
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.config.stages import SparseRlStage
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptedProblems
from exprl_megatron.training import rollouts


@pytest.mark.parametrize(("rounds", "drawn"), [(None, 0), (None, 3), (2, 0)])
def test_each_draw_of_a_problem_is_an_occurrence_of_its_own(monkeypatch, rounds, drawn):
    stage = SparseRlStage(
        kind="sparse-rl", name="s", steps=1, problems={"source": "p"}, problems_per_step=16, dynamic_sampling=rounds
    )
    problems = tuple(Problem(f"p{i}", "q") for i in range(5))
    whole = rollouts.Rollouts.__new__(rollouts.Rollouts)
    by_groups = rounds is not None
    whole._config = SimpleNamespace(seed=0, server=ServerConfig(group_requests=by_groups))
    whole._prompted = {stage.problems: PromptedProblems(problems, ((1,),) * 5, 0)}
    threads = []

    def note_thread(*_):
        threads.append(threading.current_thread())
        return ""

    whole._guards = {stage.problems: SimpleNamespace(check_request=note_thread)}
    whole._tokenizer = SimpleNamespace(decode=note_thread)
    whole._logger = SimpleNamespace(rollouts=lambda *shown: nullcontext())
    whole._judging = SimpleNamespace(grade=lambda *how: None, take_counts=dict)
    whole._custom_stages, whole._choices = {}, {}
    whole._pool = whole._shared_judge = whole._routing = None
    asked = []

    async def nothing_found(pool, prompts, *further, group_requests, **named):
        assert group_requests == by_groups
        asked.extend((prompt.problem_id, prompt.occurrence) for prompt in prompts)
        return []

    monkeypatch.setattr(rollouts, "sample_groups", nothing_found)
    asyncio.run(whole._sampled(stage, 1, drawn, ["1"]))
    assert len(asked) == 16 * (1 + (rounds or 0))
    assert len(threads) == 2 * len(asked) and threading.main_thread() not in threads
    assert len(set(asked)) == len(asked)
    most = Counter(problem for problem, _ in asked)
    assert all(occurrence < most[problem] for problem, occurrence in asked)
