"""A stage of the user's own: the class to inherit from, and what its hooks are given.

A hook that is left as it is does what the stage's `base` does.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from exprl_megatron.config.problems import Domain
from exprl_megatron.judging.judgement import Judgement
from exprl_megatron.rollout.group import Group, StepInfo
from exprl_megatron.rollout.trace import Trace


@dataclass(frozen=True)
class PromptProblem:
    """What the policy may read of a problem: neither its reference nor its answer."""

    id: str
    statement: str
    domain: Domain = "math"


@dataclass(frozen=True)
class LearnedTrace:
    """A trace of the step to learn from."""

    trace: Trace
    advantages: "float | np.ndarray | None" = None
    """Of the whole trace, or of each token [tokens]; None with `objective: supervised`, which has none."""


class RolloutContext(Protocol):
    """What `CustomStage.rollout` may use, on rank 0 while the weights are fixed. Its errors end the run."""

    info: StepInfo

    @property
    def problems(self) -> Sequence[PromptProblem]:
        """The problems that the stage may sample: those of `problems` whose prompts fit, in the set's order."""

    def next_problems(self, count: int | None = None) -> list[PromptProblem]:
        """Take the next `count` problems in the stage's seeded order; None: as many as its settings say."""

    async def sample(
        self,
        problems: Sequence[PromptProblem],
        group_size: int | None = None,
        prompt: Callable[[PromptProblem], str] | None = None,
    ) -> list[Group]:
        """Sample traces of each problem (None: `group_size` of the stage) and grade them as the stage's base does.

        `prompt` gives the text that takes the place of a problem's statement. Each text is compared with the
        references of all problems before it is sent; the run stops where one is found.
        """

    async def sample_step(self) -> list[Group]:
        """Sample and grade the step as the base does, with over-sampling and dynamic sampling."""

    async def verify(self, trace: Trace) -> Judgement:
        """Verify the answer of a trace of `sample`."""

    async def judge(self, trace: Trace) -> Judgement:
        """Ask the judge about a whole trace of `sample`; only where the base has a judge."""

    def log(self, text: str) -> None:
        """Print a line for the user and write it to the run's log."""


class LearnContext(Protocol):
    """What `CustomStage.learn` may use, on rank 0 between sampling and the updates."""

    info: StepInfo

    def default_learn(self, groups: Sequence[Group]) -> list[LearnedTrace]:
        """Return the traces of `groups`, all of one size, with the advantages that the base computes."""

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add numbers to those of the step, as `custom/NAME`."""

    def log(self, text: str) -> None:
        """Print a line for the user and write it to the run's log."""


class CustomStage:
    """A stage of the user's own. One instance exists, on rank 0; it is made with the stage's `settings`.

    What `learn` keeps in the instance is in the checkpoints where `state_dict` returns it. A resumed run reads the
    steps that are in the rollout log and calls `learn` with their groups, but not `rollout`: `rollout` must not change
    the instance, and `learn` must depend on nothing but its groups and the state.
    """

    def __init__(self, settings: Mapping[str, Any]):
        """Raise an exception where the settings cannot be used; `exprl train --dry-run` shows it."""
        self.settings = settings

    async def rollout(self, ctx: RolloutContext) -> Sequence[Group]:
        """Sample a step; returns groups, at least one, of traces that `ctx` sampled for this step."""
        return await ctx.sample_step()

    def learn(self, ctx: LearnContext, groups: Sequence[Group]) -> Sequence[LearnedTrace]:
        """Choose what is learned from the step's groups; () for a step without an update."""
        return ctx.default_learn(groups)

    def kept_problems(self) -> Collection[str] | None:
        """Return, after the last step, the ids of the problems that a later stage with `problems_from` learns from."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of the instance, as JSON has it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what `state_dict` returned."""
