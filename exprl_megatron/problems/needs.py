"""Checks whether problems have the fields that a stage needs, and whether held-out ones are used for training."""

from collections.abc import Collection, Sequence
from typing import Literal

from exprl_megatron.config.problems import Domain
from exprl_megatron.problems.problem import Problem

ProblemNeed = Literal["reference", "verification"]
"""A reference (for the judge, for SFT, for distillation), or something with which a verifier can compare."""
MAX_SHOWN_IDS = 3
_VERIFIED_BY: dict[Domain, str] = {
    "math": "answer to compare with",
    "multiple-choice": "letter to compare with",
    "code": "tests to run",
    "science": "verifier, only a judge can grade them",
}


def is_verifiable(problem: Problem) -> bool:
    """Return whether the built-in verifier (`rewards.verifier.AnswerVerifier`) can check answers to the problem."""
    if problem.domain == "code":
        return bool(problem.tests)
    return problem.domain in ("math", "multiple-choice") and problem.answer is not None


def unmet_needs(problems: Sequence[Problem], need: ProblemNeed, custom_domains: Collection[str] = ()) -> list[str]:
    """Return a sentence for each domain about the problems that lack `need`; none where all have it.

    Problems of `custom_domains` have a verifier of the user, which may not need an answer.
    """
    if need == "reference":
        lacking = [problem for problem in problems if problem.reference is None]
        return [_sentence(lacking, len(problems), "reference")] if lacking else []
    found = []
    for domain in dict.fromkeys([*_VERIFIED_BY, *(problem.domain for problem in problems)]):
        members = [problem for problem in problems if problem.domain == domain]
        lacking = [problem for problem in members if not is_verifiable(problem)]
        if lacking and domain not in custom_domains:
            wanted = _VERIFIED_BY.get(domain, "verifier in verifier.domains")
            found.append(_sentence(lacking, len(members), wanted, f"{domain} "))
    return found


def count_shared(held_out: Sequence[Problem], training: Sequence[Problem]) -> int:
    """Count the held-out problems whose text, apart from white space, is that of a problem for training."""
    known = {"".join(problem.statement.split()) for problem in training}
    return sum("".join(problem.statement.split()) in known for problem in held_out)


def _sentence(lacking: Sequence[Problem], of: int, wanted: str, kind: str = "") -> str:
    ids = ", ".join(problem.id for problem in lacking[:MAX_SHOWN_IDS]) + (
        ", ..." if len(lacking) > MAX_SHOWN_IDS else ""
    )
    return f"{len(lacking)} of {of} {kind}problems have no {wanted} ({ids}); fix them or leave them out."
