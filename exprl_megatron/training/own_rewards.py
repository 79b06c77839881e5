"""Terms of a reward that is a mixture: of judge and verifier, of the length, and of the user's own functions."""

import asyncio
from collections.abc import Callable, Mapping

from exprl_megatron.config.reward import RewardTermConfig
from exprl_megatron.judging.judgement import Judgement, value_and_evidence
from exprl_megatron.plugins.calling import Plugin
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.group import RewardTerm
from exprl_megatron.rollout.own_functions import OwnFunction
from exprl_megatron.rollout.trace import Trace


def own_terms(
    stage: str, terms: tuple[RewardTermConfig, ...], deadline_s: float, say: Callable[[str], None]
) -> dict[str, OwnFunction]:
    """Load the functions among the terms of a stage's reward, by the name of the term. Raises PluginError."""
    return {
        term.shown_name: OwnFunction(Plugin.load(f"reward of stage {stage}", term.term), deadline_s, say)
        for term in terms
        if term.is_own
    }


async def reward_terms(
    terms: tuple[RewardTermConfig, ...],
    own: Mapping[str, OwnFunction],
    judgements: Mapping[str, Judgement | None],
    problem: Problem,
    trace: Trace,
    max_tokens: int,
) -> tuple[RewardTerm, ...]:
    """Compute every term of the reward of `trace`; `judgements` are those of `judge` and `verifier`."""

    async def term_of(term: RewardTermConfig) -> RewardTerm:
        if term.term == "length":
            value: float | None = len(trace.token_ids) / max_tokens
            evidence = ""
        elif term.is_own:
            value, evidence = await own[term.shown_name].value(problem, trace)
        else:
            value, evidence = value_and_evidence(judgements.get(term.term))
        return RewardTerm(term.shown_name, term.term, term.weight, value, evidence)

    return tuple(await asyncio.gather(*map(term_of, terms)))
