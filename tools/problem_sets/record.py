"""The record that every data set is turned into, and the ids of problems that come without one."""

import hashlib
from collections.abc import Sequence
from typing import Any

from exprl_megatron.config.problems import Domain

Row = dict[str, Any]
"""A row as the data set has it."""
Record = dict[str, Any]
"""A problem as `problems.records` reads it; fields without a value are left out."""


def record(
    id: str,
    problem: str,
    source: str,
    *,
    reference: str | None = None,
    answer: str | None = None,
    domain: Domain = "math",
    choices: Sequence[str] = (),
    tests: Sequence[dict] = (),
) -> Record:
    fields = {
        "id": id,
        "problem": problem.strip(),
        "reference": text(reference),
        "answer": text(answer),
        "domain": domain,
        "choices": list(choices),
        "tests": list(tests),
        "source": source,
    }
    return {name: value for name, value in fields.items() if value}


def text(value: Any) -> str | None:
    """Return a text or a number as stripped text; None where there is nothing."""
    return None if value is None else str(value).strip() or None


def text_id(source: str, *texts: str) -> str:
    """`source-` and 12 hexadecimal digits of SHA-256 over the texts, however their white space is set.

    The id of a problem whose data set has none: it stays when rows are added, dropped or put in another order.
    """
    words = "\n".join(" ".join(part.split()) for part in texts)
    return f"{source}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"
