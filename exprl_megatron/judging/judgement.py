"""A verdict on a trace, or the reason why there is none."""

from dataclasses import asdict, dataclass, field
from typing import Literal

Granularity = Literal["trace", "prefix", "segment"]
"""What a judge is shown: the whole trace, all of it up to the end of a segment, or a segment alone."""


@dataclass(frozen=True)
class Scored:
    """A score in [0, 1] and what it rests on (the judge's words, the verifier's finding); any other: ValueError."""

    value: float
    evidence: str = ""
    hash: str | None = field(default=None, compare=False)
    """Under which the judgement store has it; None: in no store."""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:  # neither is what is not a number
            raise ValueError(f"a score is in [0, 1], not {self.value}")


@dataclass(frozen=True)
class Abstained:
    """No verdict: out of the loss, out of the group's statistics, and counted.

    `reason` is a short stable word: unreadable, out-of-range, cut-off, timeout, too-long, refused, server-error,
    verifier-timeout, verifier-error, no-verifier, no-sandbox.
    """

    reason: str
    evidence: str = ""
    hash: str | None = field(default=None, compare=False)


Judgement = Scored | Abstained


def judgement_record(judgement: Judgement) -> dict:
    """In JSON's terms: {kind: Scored | Abstained, and the fields of that}, without a hash that there is not."""
    fields = {name: value for name, value in asdict(judgement).items() if name != "hash" or value is not None}
    return {"kind": type(judgement).__name__} | fields


def value_and_evidence(judgement: Judgement | None) -> tuple[float | None, str]:
    """Return the score and no evidence; None, and why, where there is no score."""
    if judgement is None:
        return None, "not verified"
    if isinstance(judgement, Scored):
        return judgement.value, ""
    return None, f"{judgement.reason}: {judgement.evidence}"
