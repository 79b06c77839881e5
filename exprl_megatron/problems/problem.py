"""Problems, and the reference solutions that the policy never sees."""

from dataclasses import dataclass, field
from typing import NoReturn


class Reference:
    """A worked solution, for the judging side only.

    Its text is behind a method whose name says who may call it; it has no string form and no fields
    that `dataclasses.asdict`, `vars` or `json` could spread out, so that it cannot slip into a prompt, a
    log line or an f-string by accident.
    """

    __slots__ = ("_solution",)

    def __init__(self, solution: str):
        self._solution = solution

    def for_judge(self) -> str:
        """The worked solution. Only code that builds a judge's request may call this."""
        return self._solution

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and other._solution == self._solution

    def __hash__(self) -> int:
        return hash(self._solution)

    def __repr__(self) -> str:
        return "Reference(hidden)"

    def __str__(self) -> NoReturn:
        raise TypeError("a Reference has no string form; only the judging side may read it, with for_judge()")

    def __format__(self, spec: str) -> NoReturn:
        raise TypeError("a Reference has no string form; only the judging side may read it, with for_judge()")


@dataclass(frozen=True)
class Problem:
    """One question with its hidden reference and its answer in short form."""

    id: str
    text: str
    reference: Reference
    answer: str = field(repr=False)
