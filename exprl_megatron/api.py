"""The stable interface for the user's own code (docs/extending.md); all other parts of the package may change.

`API_VERSION` grows by one when a name, a field or a signature here changes in a way that existing code notices; the
changelog says how. Fields with a default may be added without that.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.problems.problem import CodeTest, Problem, Reference
from exprl_megatron.rollout.custom_stage import CustomStage, LearnContext, LearnedTrace, PromptProblem, RolloutContext
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment, RewardTerm, StepInfo
from exprl_megatron.rollout.trace import Trace

if TYPE_CHECKING:
    import torch

    from exprl_megatron.algorithms.surrogates import SurrogateBatch

API_VERSION = 1

Verifier = Callable[[Problem, Trace], Judgement | Awaitable[Judgement]]
"""`verifier.domains.NAME`: is the trace's answer right?"""
RewardFunction = Callable[[Problem, Trace], "float | Judgement | Awaitable[float | Judgement]"]
"""`reward.N.term` of a stage: a number, or Abstained where there is none."""
Estimator = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""`advantage` of a stage: (rewards [G, K] float64, valid [G, K] bool) -> advantages [G, K]."""
ProblemSource = Callable[[str], Iterable[Mapping[str, Any]]]
"""`problems.source`: (split) -> records like the lines of a problem file; called several times, always the same."""
StepMetrics = Callable[[StepInfo, Sequence[Group]], Mapping[str, float]]
"""`step_metrics`: numbers to log as `custom/NAME`."""
Surrogate = Callable[["SurrogateBatch"], "torch.Tensor"]
"""`loss.surrogate` of a stage: the policy's loss of each token [B, T]."""

__all__ = [
    "API_VERSION",
    "Abstained",
    "CodeTest",
    "CustomStage",
    "Estimator",
    "GradedTrace",
    "Group",
    "JudgedSegment",
    "Judgement",
    "LearnContext",
    "LearnedTrace",
    "PluginError",
    "Problem",
    "ProblemSource",
    "PromptProblem",
    "Reference",
    "RewardFunction",
    "RewardTerm",
    "RolloutContext",
    "Scored",
    "StepInfo",
    "StepMetrics",
    "Surrogate",
    "SurrogateBatch",
    "Trace",
    "Verifier",
]


def __getattr__(name: str) -> object:
    """Import SurrogateBatch when it is used: a verifier does not need torch."""
    if name == "SurrogateBatch":
        from exprl_megatron.algorithms.surrogates import SurrogateBatch

        return SurrogateBatch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
