"""From the scores of groups of traces to one advantage for each trace.

Every function takes `scores` [..., K] (any float dtype) and `valid` [..., K] (bool), the last
dimension being the traces of one problem, and returns float64 [..., K]. Scores that are not valid
(abstentions) enter no statistic, and their advantage is 0; so is that of a trace with nothing to be
compared with. Those of a batch look at all dimensions at once.
"""

from collections.abc import Callable

import torch

from exprl_megatron.config.losses import Advantage

STD_EPSILON = 1e-6

Estimator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [G, K], valid [G, K]) -> advantages [G, K], float64."""


def estimator(name: Advantage) -> Estimator:
    """The function that a config names."""
    return _ESTIMATORS[name]


def group_normalised(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = (s_i - mean) / (std + 1e-6), std with one degree of freedom taken off (GRPO, arXiv 2402.03300).

    A group of one trace has nothing to be compared with: mean 0 and std 1 are taken, as ExpRL does.
    Where only one trace of a larger group is valid, its advantage is 0: its raw score would be an
    advantage without a baseline.
    """
    if scores.shape[-1] == 1:
        return _cleared(scores.double() / (1 + STD_EPSILON), valid)
    return _scaled(*_deviation(scores, valid))


def mean_centred(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = s_i - mean, not divided by the std (ExpRL's second stage; Dr. GRPO, arXiv 2503.20783)."""
    return _deviation(scores, valid)[0]


def leave_one_out(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = s_i - mean of the others' scores (RLOO, arXiv 2402.14740), which is n / (n - 1) (s_i - mean)."""
    deviation, count = _deviation(scores, valid)
    return deviation * count / (count - 1).clamp(min=1)


def batch_normalised(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = (s_i - mean) / (std + 1e-6) over all valid traces of the batch (REINFORCE++, arXiv 2501.03262).

    The return of every token of a trace is its score: no discount, and the KL is a term of the loss. Each trace
    counts once in mean and std, however long it is; std has one degree of freedom taken off.
    """
    return _scaled(*_deviation(scores.flatten(), valid.flatten())).view(scores.shape)


def group_centred_batch_normalised(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = (s_i - mean of its group), then normalised over the batch (REINFORCE++ with baseline, arXiv 2501.03262).

    The only valid trace of a group is at its group's mean by necessity, and is left out of the batch's std.
    """
    deviation, count = _deviation(scores, valid)
    return batch_normalised(deviation, valid & (count > 1))


def informative(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Whether the valid scores of a group differ [...] (bool): the groups that DAPO's dynamic sampling keeps.

    For right or wrong: neither all nor none right (arXiv 2503.14476). Groups that are not have no gradient.
    """
    scores = scores.double()
    highest = scores.masked_fill(~valid, -torch.inf).amax(-1)
    lowest = scores.masked_fill(~valid, torch.inf).amin(-1)
    return highest > lowest


def _deviation(scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance from the mean of the valid scores (0 where not valid), and how many are valid."""
    cleared = _cleared(scores.double(), valid)
    count = valid.sum(-1, keepdim=True)
    mean = cleared.sum(-1, keepdim=True) / count.clamp(min=1)
    return _cleared(cleared - mean, valid), count


def _scaled(deviation: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Deviations from a mean by the std of the `count` valid ones."""
    variance = deviation.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt() + STD_EPSILON)


def _cleared(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, values, torch.zeros_like(values))


_ESTIMATORS: dict[str, Estimator] = {
    "group-normalised": group_normalised,
    "mean-centred": mean_centred,
    "leave-one-out": leave_one_out,
    "batch-normalised": batch_normalised,
    "group-centred-batch-normalised": group_centred_batch_normalised,
}
