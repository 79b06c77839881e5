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
from exprl_megatron.training import graded_sampling
from exprl_megatron.training.run_problems import RunProblems
from exprl_megatron.training.step_sampling import RunStepSampler


@pytest.mark.parametrize(("rounds", "drawn"), [(None, 0), (None, 3), (2, 0)])
def test_each_draw_of_a_problem_is_an_occurrence_of_its_own(monkeypatch, rounds, drawn):
    stage = SparseRlStage(
        kind="sparse-rl", name="s", steps=1, problems={"source": "p"}, problems_per_step=16, dynamic_sampling=rounds
    )
    problems = tuple(Problem(f"p{i}", "q") for i in range(5))
    by_groups = rounds is not None
    config = SimpleNamespace(directory="nowhere", seed=0, server=ServerConfig(group_requests=by_groups))
    threads = []

    def note_thread(*_):
        threads.append(threading.current_thread())
        return ""

    tokenizer = SimpleNamespace(decode=note_thread)
    logger = SimpleNamespace(rollouts=lambda *shown: nullcontext())
    judging = SimpleNamespace(grade=lambda *how: None, take_counts=dict)
    of_run = RunProblems(config, tokenizer, logger)
    of_run.prompted = {stage.problems: PromptedProblems(problems, ((1,),) * 5, 0)}
    of_run.guards = {stage.problems: SimpleNamespace(check_request=note_thread)}
    sampler = graded_sampling.GradedSampler(config, of_run, tokenizer, None, None, logger)
    steps = RunStepSampler(of_run, sampler, judging, tokenizer, None, logger)
    asked = []

    async def nothing_found(pool, prompts, *further, group_requests, **named):
        assert group_requests == by_groups
        asked.extend((prompt.problem_id, prompt.occurrence) for prompt in prompts)
        return []

    monkeypatch.setattr(graded_sampling, "sample_groups", nothing_found)
    asyncio.run(steps.sample_step(stage, 1, drawn, ["1"]))
    assert len(asked) == 16 * (1 + (rounds or 0))
    assert len(threads) == 2 * len(asked) and threading.main_thread() not in threads
    assert len(set(asked)) == len(asked)
    most = Counter(problem for problem, _ in asked)
    assert all(occurrence < most[problem] for problem, occurrence in asked)
