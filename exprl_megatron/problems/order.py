"""The order in which a stage meets its problems: seeded, and a function of the position alone."""

import hashlib
import random


def problem_indices(seed: int, stage_name: str, position: int, count: int, n: int) -> list[int]:
    """Indices (0-based, below `n`) of the `count` problems after the first `position` ones.

    All `n` problems come once in each epoch, shuffled again for every epoch; a step may reach across
    two. A resumed run needs its position and nothing else. Raises ValueError where `n` is below 1.
    """
    if n < 1:
        raise ValueError("there are no problems to put in order")
    indices, place = [], position
    while len(indices) < count:
        epoch, offset = divmod(place, n)
        taken = _shuffled(seed, stage_name, epoch, n)[offset : offset + count - len(indices)]
        indices += taken
        place += len(taken)
    return indices


def _shuffled(seed: int, stage_name: str, epoch: int, n: int) -> list[int]:
    digest = hashlib.sha256(f"{seed}/{stage_name}/{epoch}".encode()).digest()
    order = list(range(n))
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return order
