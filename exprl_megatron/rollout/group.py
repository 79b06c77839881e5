"""The K traces of one problem, each with its judgement: what a step learns from."""

from dataclasses import dataclass

from exprl_megatron.config.problems import Domain
from exprl_megatron.judging.judgement import Judgement, Scored
from exprl_megatron.rollout.trace import Trace


@dataclass(frozen=True)
class JudgedSegment:
    """A token span of a trace, half-open, and the verdict on it (or on everything up to its end)."""

    start: int
    end: int
    judgement: Judgement


@dataclass(frozen=True)
class GradedTrace:
    """A trace and the verdict on it."""

    trace: Trace
    judgement: Judgement
    """On the whole; where the trace was judged by segments, the last one's, or the first abstention among them."""
    segments: tuple[JudgedSegment, ...] = ()
    """Cover the trace's tokens exactly once, in order; empty where the trace was judged whole."""
    verified: Judgement | None = None
    """The answer verifier's finding, for the logs alone, where a judge gave the judgement."""

    @property
    def score(self) -> float | None:
        """The score in [0, 1], or None where the judge or verifier abstained."""
        return self.judgement.value if isinstance(self.judgement, Scored) else None

    @property
    def units(self) -> list[Judgement]:
        """Every verdict that was asked for: on each segment, or on the whole."""
        return [segment.judgement for segment in self.segments] or [self.judgement]


@dataclass(frozen=True)
class Group:
    """All traces of one problem in one step, ordered by sample number."""

    problem_id: str
    members: tuple[GradedTrace, ...]
    domain: Domain = "math"

    @property
    def scores(self) -> list[float]:
        """Scores of the members that have one."""
        return [member.score for member in self.members if member.score is not None]
