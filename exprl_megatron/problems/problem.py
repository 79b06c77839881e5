"""A problem, and the parts of it that are hidden from the policy."""

import string
from dataclasses import dataclass, field
from typing import NoReturn

from exprl_megatron.config.problems import Domain


class Reference:
    """A worked solution, hidden from the policy.

    Its text is returned only by methods whose names state the permitted callers. It has no string form and no fields
    that `dataclasses.asdict`, `vars` or `json` could expose, so that it cannot enter a prompt, a log line or an
    f-string by accident.
    """

    __slots__ = ("_solution",)

    def __init__(self, solution: str):
        self._solution = solution

    def for_judge(self) -> str:
        """Return the worked solution. Only code that builds a judge's request, and a verifier, may call this."""
        return self._solution

    def for_training(self) -> str:
        """Return the worked solution, as a target of SFT or in the prompt of self-distillation's frozen teacher.

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
    """Standard input; of a call one line for each argument, as JSON."""
    output: str
    """Expected standard output; of a call the expected value as JSON."""
    function: str | None = None
    """Name of the function (or method of `Solution`) to call; None: the program is run on `input`."""


@dataclass(frozen=True)
class Problem:
    """A question with its hidden reference solution and, where there is one, its short answer."""

    id: str
    text: str
    """The question without its choices."""
    reference: Reference | None = None
    """None where only the answer is known, as in most benchmarks."""
    answer: str | None = field(default=None, repr=False)
    """The value, or the letter of a choice, that the verifier compares with. None: only a judge can grade it."""
    domain: Domain = "math"
    choices: tuple[str, ...] = ()
    """The choices of a multiple-choice problem, in the order of their letters."""
    tests: tuple[CodeTest, ...] = field(default=(), repr=False)
    source: str = ""
    """The data set that the problem comes from."""

    @property
    def statement(self) -> str:
        """The text for policy and judge: the question and, below it, the lettered choices if there are any."""
        letters = zip(string.ascii_uppercase, self.choices, strict=False)
        return "\n".join([self.text, *(f"{letter}. {choice}" for letter, choice in letters)])
