"""Terms of a reward that is a weighted sum: judge, verifier, length, and functions of the user."""

import asyncio
from collections.abc import Callable, Mapping

from exprl_megatron.config.reward import RewardTermConfig
from exprl_megatron.judging.judgement import Judgement, value_and_evidence
from exprl_megatron.plugins.calling import Plugin
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.custom_functions import CustomFunction
from exprl_megatron.rollout.group import RewardTerm
from exprl_megatron.rollout.trace import Trace


def custom_terms(
    stage: str, terms: tuple[RewardTermConfig, ...], deadline_s: float, log: Callable[[str], None]
) -> dict[str, CustomFunction]:
    """Load the functions among the terms of a stage's reward, by the name of the term.

    Args:
        stage: name of the stage.
        terms: the terms of its reward.
        deadline_s: seconds that one call may take.
        log: gets a line for each new failure.

    Raises:
        PluginError: a function cannot be loaded or takes other arguments.
    """
    return {
        term.shown_name: CustomFunction(Plugin.load(f"reward of stage {stage}", term.term), deadline_s, log)
        for term in terms
        if term.is_custom
    }


async def reward_terms(
    terms: tuple[RewardTermConfig, ...],
    custom: Mapping[str, CustomFunction],
    judgements: Mapping[str, Judgement | None],
    problem: Problem,
    trace: Trace,
    max_tokens: int,
) -> tuple[RewardTerm, ...]:
    """Compute every term of the reward of `trace`.

    Args:
        terms: the terms of the stage's reward.
        custom: the user's functions by the names of their terms.
        judgements: the judgements of `judge` and `verifier`.
        problem: the problem.
        trace: the trace.
        max_tokens: the stage's limit of new tokens, by which the term `length` is divided.

    Raises:
        PluginError: a function returned an invalid result.
    """

    async def term_of(term: RewardTermConfig) -> RewardTerm:
        if term.term == "length":
            value: float | None = len(trace.token_ids) / max_tokens
            evidence = ""
        elif term.is_custom:
            value, evidence = await custom[term.shown_name].value(problem, trace)
        else:
            value, evidence = value_and_evidence(judgements.get(term.term))
        return RewardTerm(term.shown_name, term.term, term.weight, value, evidence)

    return tuple(await asyncio.gather(*map(term_of, terms)))
