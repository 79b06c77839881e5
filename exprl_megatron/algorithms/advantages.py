"""Advantage estimators: they compute one advantage for each trace from the scores of groups of traces.

Every function takes `scores` [..., K] (any float dtype) and `valid` [..., K] (bool), where the last
dimension has the traces of one problem, and returns float64 [..., K]. Invalid scores
(abstentions) are excluded from all statistics, and their advantage is 0; so is the advantage of a trace
without another one to compare with. The estimators of a batch use statistics over all dimensions.
"""

from collections.abc import Callable

import torch

from exprl_megatron.plugins.calling import Plugin, described

STD_EPSILON = 1e-6

AdvantageFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [G, K], valid [G, K]) -> advantages [G, K], float64."""


def advantage_fn(name: str) -> AdvantageFn:
    """Return the advantage function of a config's `advantage`: a built-in one, or the user's.

    Raises:
        PluginError: the user's function cannot be loaded. The returned function raises it where the user's fails, or
            returns anything but finite advantages of the shape of the scores.
    """
    return _ESTIMATORS[name] if name in _ESTIMATORS else _custom_estimator(Plugin.load("advantage", name))


def group_normalized(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute A_i = (s_i - mean) / (std + 1e-6) [..., K], std with ddof=1 (GRPO, arXiv 2402.03300).

    A group of one trace has no baseline: it uses mean 0 and std 1, as ExpRL's code does.
    Where only one trace of a larger group is valid, its advantage is 0: its raw score would be an
    advantage without a baseline.
    """
    if scores.shape[-1] == 1:
        return _cleared(scores.double() / (1 + STD_EPSILON), valid)
    return _scaled(*_deviation(scores, valid))


def mean_centered(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute A_i = s_i - mean [..., K], not divided by the std (ExpRL's second stage; Dr. GRPO, arXiv 2503.20783)."""
    return _deviation(scores, valid)[0]


def leave_one_out(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute A_i = s_i - mean of the others' scores [..., K] (RLOO, arXiv 2402.14740): n / (n - 1) (s_i - mean)."""
    deviation, count = _deviation(scores, valid)
    return deviation * count / (count - 1).clamp(min=1)


def batch_normalized(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute A_i = (s_i - mean) / (std + 1e-6) [..., K] over all valid traces (REINFORCE++, arXiv 2501.03262).

    The return of every token of a trace is its score: no discount, and the KL is a term of the loss. Each trace
    counts once in mean and std, regardless of its length; std has ddof=1.
    """
    return _scaled(*_deviation(scores.flatten(), valid.flatten())).view(scores.shape)


def group_centered_batch_normalized(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute A_i = s_i - mean of its group, normalized over the batch [..., K] (arXiv 2501.03262, with baseline).

    The only valid trace of a group always equals its group's mean, and is excluded from the batch's std.
    """
    deviation, count = _deviation(scores, valid)
    return batch_normalized(deviation, valid & (count > 1))


def has_variance(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return whether the valid scores of each group differ: bool [...]; dynamic sampling (DAPO) keeps these groups.

    With scores of 0 and 1 these are the groups with right and wrong traces (arXiv 2503.14476). Zero-variance groups
    have no gradient.
    """
    scores = scores.double()
    highest = scores.masked_fill(~valid, -torch.inf).amax(-1)
    lowest = scores.masked_fill(~valid, torch.inf).amin(-1)
    return highest > lowest


def _deviation(scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the deviations [..., K] from the mean of the valid scores (0 where invalid), and the counts [..., 1]."""
    cleared = _cleared(scores.double(), valid)
    count = valid.sum(-1, keepdim=True)
    mean = cleared.sum(-1, keepdim=True) / count.clamp(min=1)
    return _cleared(cleared - mean, valid), count


def _scaled(deviation: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Divide deviations [..., K] by the std of the `count` valid ones."""
    variance = deviation.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return deviation / (variance.sqrt() + STD_EPSILON)


def _custom_estimator(plugin: Plugin) -> AdvantageFn:
    plugin.check_arguments(("scores", "valid"))

    def advantages(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        found = plugin(scores.clone(), valid.clone())
        if not isinstance(found, torch.Tensor) or found.shape != scores.shape:
            raise plugin.failure(
                f"returned {described(found)} instead of a tensor of the shape {tuple(scores.shape)} of scores"
            )
        if found.is_complex() or found.device != scores.device:
            raise plugin.failure(
                f"returned advantages of {found.dtype} on {found.device} instead of numbers on {scores.device}"
            )
        cleared = _cleared(found.detach().double(), valid)
        if not cleared.isfinite().all():
            group = int((~cleared.isfinite()).nonzero()[0][0])
            raise plugin.failure(
                f"returned an advantage that is not finite for the scores {scores[group].tolist()} of group {group}"
            )
        return cleared

    return advantages


def _cleared(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, values, torch.zeros_like(values))


_ESTIMATORS: dict[str, AdvantageFn] = {
    "group-normalized": group_normalized,
    "mean-centered": mean_centered,
    "leave-one-out": leave_one_out,
    "batch-normalized": batch_normalized,
    "group-centered-batch-normalized": group_centered_batch_normalized,
}
