"""From the judgements of a group to the tensors that its advantages are computed from."""

from collections.abc import Sequence
from typing import Literal

import torch

from exprl_megatron.judging.judgement import Judgement, Scored


def group_scores(
    judgements: Sequence[Judgement],
    overlong: Sequence[bool],
    overlong_rule: Literal["zero", "score", "exclude"] = "score",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [K] (float64, 0 where there is none) and whether each is valid [K] (bool).

    A trace that ran into the length limit and was scored keeps its score; with the rule `zero` it counts as 0 and
    stays in the statistics, with `exclude` it is not valid. An abstention stays one, overlong or not.
    """
    rows = list(zip(judgements, overlong, strict=True))
    valid = [isinstance(judgement, Scored) and not (cut and overlong_rule == "exclude") for judgement, cut in rows]
    values = [
        judgement.value if counts and not (cut and overlong_rule == "zero") else 0.0
        for (judgement, cut), counts in zip(rows, valid, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(valid, dtype=torch.bool)


def soft_overlong_punishment(lengths: Sequence[int], max_length: int, cache: int) -> torch.Tensor:
    """DAPO's R_length [K] (float64, -1 to 0) of traces of so many tokens (arXiv 2503.14476, equation 13).

    0 up to max_length - cache tokens, from there in a line to -1 at max_length, and -1 above it.
    """
    tokens = torch.tensor(lengths, dtype=torch.float64)
    return ((max_length - cache - tokens) / cache).clamp(min=-1.0, max=0.0)
