"""The seeded order of a stage's problems, which depends on the position alone."""

import hashlib
import random


def problem_indices(seed: int, stage_name: str, position: int, count: int, n: int) -> list[int]:
    """Return the indices (0-based, below `n`) of the `count` problems after the first `position` ones.

    Each epoch has every problem once, in a different order; a step may contain the end of one epoch and the start of
    the next. A resumed run needs only its position.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError("there are no problems to put in order")
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), n)
        indices += _shuffled(seed, stage_name, epoch, n)[offset : offset + count - len(indices)]
    return indices


def _shuffled(seed: int, stage_name: str, epoch: int, n: int) -> list[int]:
    digest = hashlib.sha256(f"{seed}/{stage_name}/{epoch}".encode()).digest()
    order = list(range(n))
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return order
