"""Judgements: a score of a trace, or an abstention with its reason."""

import re
from dataclasses import asdict, dataclass, field
from typing import Literal

Granularity = Literal["trace", "prefix", "segment"]
"""What a judge reads: the whole trace, all of it up to the end of a segment, or one segment."""

REASON = re.compile(r"[a-z0-9][a-z0-9-]{,23}")
"""A reason for an abstention: it names a metric, which leaves the machine with trackers, and is too short for a
reference."""


@dataclass(frozen=True)
class Scored:
    """A score in [0, 1] and its evidence (the judge's answer, or the verifier's finding).

    Raises:
        ValueError: the score is not in [0, 1].
    """

    value: float
    evidence: str = ""
    hash: str | None = field(default=None, compare=False)
    """The judgement's key in the judgement store; None: it is not stored."""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:  # nan fails the comparison too
            raise ValueError(f"a score is in [0, 1], not {self.value}")


@dataclass(frozen=True)
class Abstained:
    """No score: the trace is excluded from the loss and from the group's statistics, and counted.

    `reason` is a short stable word (REASON): unreadable, out-of-range, cut-off, timeout, too-long, refused,
    server-error, verifier-timeout, verifier-error, no-verifier, no-sandbox.
    """

    reason: str
    evidence: str = ""
    hash: str | None = field(default=None, compare=False)


Judgement = Scored | Abstained


def judgement_to_dict(judgement: Judgement) -> dict:
    """Return a judgement as JSON types: `kind` (Scored or Abstained) and its fields; without `hash` if it is None."""
    fields = {name: value for name, value in asdict(judgement).items() if name != "hash" or value is not None}
    return {"kind": type(judgement).__name__} | fields


def value_and_evidence(judgement: Judgement | None) -> tuple[float | None, str]:
    """Return the score and no evidence; or None and the reason, where there is no score."""
    if judgement is None:
        return None, "not verified"
    if isinstance(judgement, Scored):
        return judgement.value, ""
    return None, f"{judgement.reason}: {judgement.evidence}"
