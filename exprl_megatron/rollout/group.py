"""The K traces of one problem, each with its judgement: what a step learns from."""

from dataclasses import dataclass

from exprl_megatron.judging.judgement import Judgement, Scored
from exprl_megatron.rollout.trace import Trace


@dataclass(frozen=True)
class GradedTrace:
    """A trace and the verdict on it."""

    trace: Trace
    judgement: Judgement

    @property
    def score(self) -> float | None:
        """The score in [0, 1], or None where the judge or verifier abstained."""
        return self.judgement.value if isinstance(self.judgement, Scored) else None


@dataclass(frozen=True)
class Group:
    """All traces of one problem in one step, ordered by sample number."""

    problem_id: str
    members: tuple[GradedTrace, ...]

    @property
    def scores(self) -> list[float]:
        """Scores of the members that have one."""
        return [member.score for member in self.members if member.score is not None]
