"""From the scores of a group of traces to one advantage for each trace.

Every function takes `scores` [..., K] (any float dtype) and `valid` [..., K] (bool), the last
dimension being the traces of one problem, and returns float64 [..., K]. Scores that are not valid
(abstentions) enter no statistic, and their advantage is 0.
"""

import torch

STD_EPSILON = 1e-6


def group_normalised(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = (s_i - mean) / (std + 1e-6), std with one degree of freedom taken off (GRPO, arXiv 2402.03300).

    A group of one trace has nothing to be compared with: mean 0 and std 1 are taken, as ExpRL does.
    Where only one trace of a larger group is valid, its advantage is 0: its raw score would be an
    advantage without a baseline.
    """
    if scores.shape[-1] == 1:
        return _cleared(scores.double() / (1 + STD_EPSILON), valid)
    deviation, count = _deviation(scores, valid)
    variance = deviation.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt() + STD_EPSILON)


def mean_centred(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = s_i - mean, not divided by the std (ExpRL's second stage; Dr. GRPO, arXiv 2503.20783)."""
    return _deviation(scores, valid)[0]


def _deviation(scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance from the mean of the valid scores (0 where not valid), and how many are valid."""
    cleared = _cleared(scores.double(), valid)
    count = valid.sum(-1, keepdim=True)
    mean = cleared.sum(-1, keepdim=True) / count.clamp(min=1)
    return _cleared(cleared - mean, valid), count


def _cleared(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, values, torch.zeros_like(values))
