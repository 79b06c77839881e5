"""Scores and validity of a group's judgements, as tensors for the advantage estimators."""

from collections.abc import Sequence
from typing import Literal

import torch

from exprl_megatron.judging.judgement import Judgement, Scored


def group_scores(
    judgements: Sequence[Judgement],
    overlong: Sequence[bool],
    overlong_rule: Literal["zero", "score", "exclude"] = "score",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute scores [K] (float64, 0 for abstentions) and their validity [K] (bool).

    Args:
        judgements: the judgements of the group's K traces.
        overlong: whether the length limit ended each trace.
        overlong_rule: what a scored overlong trace gets: its `score`, `zero` (it stays in the statistics), or
            `exclude` (it is not valid). Abstentions are never valid.
    """
    rows = list(zip(judgements, overlong, strict=True))
    valid = [isinstance(judgement, Scored) and not (cut and overlong_rule == "exclude") for judgement, cut in rows]
    values = [
        judgement.value if isinstance(judgement, Scored) and not (cut and overlong_rule != "score") else 0.0
        for judgement, cut in rows
    ]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(valid, dtype=torch.bool)


def soft_overlong_punishment(lengths: Sequence[int], max_length: int, cache: int) -> torch.Tensor:
    """Compute DAPO's R_length [K] (float64, -1 to 0) of traces of `lengths` tokens (arXiv 2503.14476, equation 13).

    It is 0 up to max_length - cache tokens, then falls linearly to -1 at max_length, and is -1 above it.
    """
    tokens = torch.tensor(lengths, dtype=torch.float64)
    return ((max_length - cache - tokens) / cache).clamp(min=-1.0, max=0.0)
