"""Problem sources: `problems.source: examples.problem_sources:FUNCTION`."""

import random
from collections.abc import Iterator
from typing import Any

_SIZES = {"train": 256, "heldout": 64}


def sums(split: str) -> Iterator[dict[str, Any]]:
    """Yield additions of two numbers, other ones for each split, in the miniature's language.

    Records have the fields of a problem file. A source is read several times in a run, in several processes, and must
    yield the same records each time: its randomness has a fixed seed.
    """
    draw = random.Random(f"sums of {split}")
    for number in range(_SIZES[split]):
        a, b = draw.randrange(40), draw.randrange(40)
        yield {
            "id": f"{split}-{number}",
            "problem": f"Q {a} s1 + {b} A",
            "reference": f"s1 {a + b} ans {a + b}",
            "answer": str(a + b),
        }
