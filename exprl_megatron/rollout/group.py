"""The K traces of one problem with their judgements: the unit of data that a step learns from."""

from dataclasses import dataclass

from exprl_megatron.config.problems import Domain
from exprl_megatron.judging.judgement import Judgement, Scored
from exprl_megatron.rollout.trace import Trace


@dataclass(frozen=True)
class JudgedSegment:
    """A half-open span of a trace's tokens, and the judgement of it or of the prefix that ends with it."""

    start: int
    end: int
    judgement: Judgement


@dataclass(frozen=True)
class RewardTerm:
    """One term of a trace's reward."""

    name: str
    source: str
    """`judge`, `verifier`, `length`, or the path of the user's function."""
    weight: float
    value: float | None
    """The value before weighting; None: an abstention."""
    evidence: str = ""
    """What the value is based on; of an abstention it begins with the reason."""


@dataclass(frozen=True)
class GradedTrace:
    """A trace and its judgement."""

    trace: Trace
    judgement: Judgement
    """The judgement of the whole trace. Of a trace that was judged by segments: the last one, or the first
    abstention."""
    segments: tuple[JudgedSegment, ...] = ()
    """They cover the trace's tokens exactly once, in order; empty where the trace was judged as a whole."""
    verified: Judgement | None = None
    """The answer verifier's result where a judge made the judgement."""
    terms: tuple[RewardTerm, ...] = ()
    """The terms of a reward that is a weighted sum; empty where the reward is the score."""

    @property
    def reward(self) -> float | None:
        """The reward of the trace: the weighted sum of the terms, or the score; None where any of them is missing.

        A stage's length penalty is not included.
        """
        if not self.terms:
            return self.score
        found = [term.weight * term.value for term in self.terms if term.value is not None]
        return sum(found) if len(found) == len(self.terms) else None

    @property
    def score(self) -> float | None:
        """The score in [0, 1], or None where the judge or verifier abstained."""
        return self.judgement.value if isinstance(self.judgement, Scored) else None

    @property
    def judgements(self) -> list[Judgement]:
        """Every judgement that was requested: one for each segment, or the one on the whole trace."""
        return [segment.judgement for segment in self.segments] or [self.judgement]


@dataclass(frozen=True)
class Group:
    """All traces of one problem in one step, ordered by sample number."""

    problem_id: str
    samples: tuple[GradedTrace, ...]
    domain: Domain = "math"

    @property
    def rewards(self) -> list[float]:
        """Rewards of the samples that have one."""
        return [sample.reward for sample in self.samples if sample.reward is not None]

    @property
    def scores(self) -> list[float]:
        """Scores of the samples that are not abstentions."""
        return [sample.score for sample in self.samples if sample.score is not None]


@dataclass(frozen=True)
class StepInfo:
    """The step that groups were sampled for."""

    stage: str
    step: int
    """1-based, within the stage."""
