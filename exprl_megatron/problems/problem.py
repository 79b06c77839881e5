"""A problem and the parts of it that the policy never sees."""

import string
from dataclasses import dataclass, field
from typing import NoReturn

from exprl_megatron.config.problems import Domain


class Reference:
    """A worked solution, hidden from the policy.

    Its text is behind methods whose names say who may call them; it has no string form and no fields
    that `dataclasses.asdict`, `vars` or `json` could spread out, so that it cannot slip into a prompt, a
    log line or an f-string by accident.
    """

    __slots__ = ("_solution",)

    def __init__(self, solution: str):
        self._solution = solution

    def for_judge(self) -> str:
        """The worked solution. Only code that builds a judge's request may call this."""
        return self._solution

    def for_training(self) -> str:
        """The worked solution, as a target of SFT or in the prompt of self-distillation's frozen teacher.

        Only the trainer may call this; nothing that it returns may be sent to a sampling server.
        """
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
class CodeTest:
    """One test of a program."""

    input: str
    """Standard input; for a call one JSON value a line, each an argument."""
    output: str
    """Expected standard output; for a call the expected value as JSON."""
    function: str | None = None
    """Name of the function (or method of `Solution`) to call; None: the program is run on `input`."""


@dataclass(frozen=True)
class Problem:
    """One question with its hidden reference and, where it has one, its answer in short form."""

    id: str
    text: str
    """The question without its choices."""
    reference: Reference | None = None
    """None where only the answer is known, as in most benchmarks."""
    answer: str | None = field(default=None, repr=False)
    """What the verifier compares with: a value, or the letter of a choice. None: only a judge can tell."""
    domain: Domain = "math"
    choices: tuple[str, ...] = ()
    """Of a multiple-choice problem, in the order of their letters."""
    tests: tuple[CodeTest, ...] = field(default=(), repr=False)
    source: str = ""
    """The data set that the problem comes from."""

    @property
    def statement(self) -> str:
        """What policy and judge read: the question, and below it the lettered choices where there are any."""
        letters = zip(string.ascii_uppercase, self.choices, strict=False)
        return "\n".join([self.text, *(f"{letter}. {choice}" for letter, choice in letters)])
