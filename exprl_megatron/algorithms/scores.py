"""From the judgements of a group to the tensors that its advantages are computed from."""

from collections.abc import Sequence
from typing import Literal

import torch

from exprl_megatron.judging.judgement import Judgement, Scored


def group_scores(
    judgements: Sequence[Judgement], overlong: Sequence[bool], overlong_rule: Literal["zero", "score"] = "score"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [K] (float64, 0 where there is none) and whether each is valid [K] (bool).

    With the rule `zero` a trace that ran into the length limit and was scored counts as 0 and stays
    in the statistics; an abstention stays one, overlong or not.
    """
    valid = torch.tensor([isinstance(judgement, Scored) for judgement in judgements], dtype=torch.bool)
    values = [
        judgement.value if isinstance(judgement, Scored) and not (cut and overlong_rule == "zero") else 0.0
        for judgement, cut in zip(judgements, overlong, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64), valid
