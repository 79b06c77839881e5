"""Counts of a verifier's judgements on the samples of one problem, and estimates of pass@k from them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from exprl_megatron.evaluation.pass_at_k import PassAtK, estimate_pass_at_k
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored


@dataclass(frozen=True)
class SampleCounts:
    """Counts of one problem's samples; abstentions are not part of `graded`."""

    graded: int
    correct: int
    abstained: dict[str, int] = field(default_factory=dict)
    """Number of abstentions by reason."""

    @property
    def solve_rate(self) -> float | None:
        """Share of the graded samples that are correct; None where there are none."""
        return self.correct / self.graded if self.graded else None


def count_samples(judgements: Iterable[Judgement]) -> SampleCounts:
    """Count a verifier's judgements, whose scores are 0 or 1."""
    found = list(judgements)
    scores = [judgement.value for judgement in found if isinstance(judgement, Scored)]
    reasons = Counter(judgement.reason for judgement in found if isinstance(judgement, Abstained))
    return SampleCounts(len(scores), round(sum(scores)), dict(sorted(reasons.items())))


def estimate_each_k(counts: Sequence[SampleCounts], ks: Sequence[int], confidence: float) -> list[PassAtK]:
    """Estimate pass@k over problems, for each k for which a problem has enough graded samples."""
    pairs = [(each.graded, each.correct) for each in counts]
    reachable = max((graded for graded, _ in pairs), default=0)
    return [estimate_pass_at_k(pairs, k, confidence) for k in ks if k <= reachable]
