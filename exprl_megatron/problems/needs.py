"""Checks whether problems have what a stage needs of them."""

from collections.abc import Collection, Sequence
from typing import Literal

from exprl_megatron.config.problems import Domain
from exprl_megatron.problems.problem import Problem

ProblemNeed = Literal["reference", "verification"]
"""A reference (to judge by, to imitate, to distil from), or something that a verifier can compare with."""
SHOWN_IDS = 3
_VERIFIED_BY: dict[Domain, str] = {
    "math": "answer to compare with",
    "multiple-choice": "letter to compare with",
    "code": "tests to run",
    "science": "verifier, only a judge can grade them",
}


def verifiable(problem: Problem) -> bool:
    """Whether the built-in verifier can check the problem's answer (`rewards.verifier.AnswerVerifier`)."""
    if problem.domain == "code":
        return bool(problem.tests)
    return problem.domain in ("math", "multiple-choice") and problem.answer is not None


def missing_for(problems: Sequence[Problem], need: ProblemNeed, own_verifiers: Collection[str] = ()) -> list[str]:
    """Return a sentence for each domain about the problems that lack `need`; none where all have it.

    Problems of the domains `own_verifiers` have a verifier of the user, which may not need an answer.
    """
    if need == "reference":
        lacking = [problem for problem in problems if problem.reference is None]
        return [_sentence(lacking, len(problems), "reference")] if lacking else []
    found = []
    for domain in dict.fromkeys([*_VERIFIED_BY, *(problem.domain for problem in problems)]):
        members = [problem for problem in problems if problem.domain == domain]
        lacking = [problem for problem in members if not verifiable(problem)]
        if lacking and domain not in own_verifiers:
            wanted = _VERIFIED_BY.get(domain, "verifier in verifier.domains")
            found.append(_sentence(lacking, len(members), wanted, f"{domain} "))
    return found


def _sentence(lacking: Sequence[Problem], of: int, wanted: str, kind: str = "") -> str:
    ids = ", ".join(problem.id for problem in lacking[:SHOWN_IDS]) + (", ..." if len(lacking) > SHOWN_IDS else "")
    return f"{len(lacking)} of {of} {kind}problems have no {wanted} ({ids}); fix them or leave them out."
