"""How well a judge's scores tell right traces from wrong ones, and the wrong references that test whether it reads."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

RIGHT_FROM = 4
"""A score of 4 or 5 means that the judge takes the trace for right."""
_WRONG_REFERENCE_SEED = 0xC0DE


@dataclass(frozen=True)
class Misplacement:
    """Shares of the traces that the judge put on the wrong side."""

    false_negative: float
    """Right traces scored 3 or less."""
    false_positive: float
    """Wrong traces scored 4 or more."""

    @property
    def rate(self) -> float:
        """(FNR + FPR) / 2: 0.5 is what a judge gets that does not look."""
        return (self.false_negative + self.false_positive) / 2


def misplacement(scores: Sequence[int | None], correct: Sequence[bool]) -> Misplacement:
    """From scores 1..5 (None: abstained, not counted) and whether each trace is right in truth.

    A side without traces has a share of 0.
    """
    pairs = [(score, right) for score, right in zip(scores, correct, strict=True) if score is not None]
    on_right = [score < RIGHT_FROM for score, right in pairs if right]
    on_wrong = [score >= RIGHT_FROM for score, right in pairs if not right]
    return Misplacement(_share(on_right), _share(on_wrong))


def wrong_references(keys: Sequence[str]) -> dict[str, str]:
    """For each problem another one whose reference it is given: the sorted keys shuffled, each takes the next one's.

    The released calibration's rule (seed 0xC0DE).
    """
    order = sorted(keys)
    random.Random(_WRONG_REFERENCE_SEED).shuffle(order)
    return {key: order[(i + 1) % len(order)] for i, key in enumerate(order)}


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
