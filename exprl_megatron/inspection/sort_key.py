"""What `exprl show --sort` takes."""

from enum import StrEnum


class SortKey(StrEnum):
    """What groups, and the traces within them, are ordered by."""

    SCORE = "score"
    SPREAD = "spread"
    LENGTH = "length"
    DISAGREEMENT = "disagreement"
    GAP = "gap"
