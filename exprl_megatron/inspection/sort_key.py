"""The values of `exprl show --sort`."""

from enum import StrEnum


class SortKey(StrEnum):
    """The value by which groups, and the traces within them, are sorted."""

    SCORE = "score"
    SPREAD = "spread"
    LENGTH = "length"
    DISAGREEMENT = "disagreement"
    GAP = "gap"
