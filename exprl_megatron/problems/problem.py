"""Problems, and the reference solutions that the policy never sees."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reference:
    """A worked solution, for the judging side only.

    Its text is behind a method whose name says who may call it; it has no string form, so that it
    cannot slip into a prompt, a log line or an f-string by accident.
    """

    _solution: str = field(repr=False)

    def for_judge(self) -> str:
        """The worked solution. Only code that builds a judge's request may call this."""
        return self._solution

    def __str__(self) -> str:
        raise TypeError("a Reference has no string form; only the judging side may read it, with for_judge()")

    def __format__(self, spec: str) -> str:
        return str(self)


@dataclass(frozen=True)
class Problem:
    """One question with its hidden reference and its answer in short form."""

    id: str
    text: str
    reference: Reference
    answer: str = field(repr=False)
