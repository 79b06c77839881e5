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
