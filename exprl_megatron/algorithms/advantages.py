"""Advantage estimators: from the scores of groups of traces to one advantage for each trace.

Every function takes `scores` [..., K] (any float dtype) and `valid` [..., K] (bool), the last
dimension being the traces of one problem, and returns float64 [..., K]. Invalid scores
(abstentions) are in no statistic, and their advantage is 0, as is that of a trace with no other to
compare it with. The estimators of a batch take their statistics over all dimensions.
"""

from collections.abc import Callable

import torch

from exprl_megatron.plugins.calling import Plugin, described

STD_EPSILON = 1e-6

AdvantageFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores [G, K], valid [G, K]) -> advantages [G, K], float64."""


def estimator(name: str) -> AdvantageFn:
    """Return the advantage function of a config's `advantage`: a built-in one, or the user's.

    Raises PluginError where the user's cannot be loaded; the function raises it where theirs fails, or returns
    something else than finite advantages of the shape of the scores.
    """
    return _ESTIMATORS[name] if name in _ESTIMATORS else _own_estimator(Plugin.load("advantage", name))


def group_normalized(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = (s_i - mean) / (std + 1e-6), std with ddof=1 (GRPO, arXiv 2402.03300).

    A group of one trace has no baseline: mean 0 and std 1 are taken, as in ExpRL's code.
    Where only one trace of a larger group is valid, its advantage is 0: its raw score would be an
    advantage without a baseline.
    """
    if scores.shape[-1] == 1:
        return _cleared(scores.double() / (1 + STD_EPSILON), valid)
    return _scaled(*_deviation(scores, valid))


def mean_centered(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = s_i - mean, not divided by the std (ExpRL's second stage; Dr. GRPO, arXiv 2503.20783)."""
    return _deviation(scores, valid)[0]


def leave_one_out(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = s_i - mean of the others' scores (RLOO, arXiv 2402.14740), which is n / (n - 1) (s_i - mean)."""
    deviation, count = _deviation(scores, valid)
    return deviation * count / (count - 1).clamp(min=1)


def batch_normalized(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = (s_i - mean) / (std + 1e-6) over all valid traces of the batch (REINFORCE++, arXiv 2501.03262).

    The return of every token of a trace is its score: no discount, and the KL is a term of the loss. Each trace
    counts once in mean and std, however long it is; std has ddof=1.
    """
    return _scaled(*_deviation(scores.flatten(), valid.flatten())).view(scores.shape)


def group_centered_batch_normalized(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = (s_i - mean of its group), then normalized over the batch (REINFORCE++ with baseline, arXiv 2501.03262).

    The only valid trace of a group always equals its group's mean, and is left out of the batch's std.
    """
    deviation, count = _deviation(scores, valid)
    return batch_normalized(deviation, valid & (count > 1))


def informative(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Whether the valid scores of each group differ: [...], bool; dynamic sampling (DAPO) keeps these groups.

    With scores 0 and 1: neither all nor none right (arXiv 2503.14476). Zero-variance groups have no gradient.
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


def _own_estimator(plugin: Plugin) -> AdvantageFn:
    plugin.check_arguments(("scores", "valid"))

    def advantages(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        found = plugin(scores.clone(), valid.clone())
        if not isinstance(found, torch.Tensor) or found.shape != scores.shape:
            raise plugin.failure(
                f"returned {described(found)} instead of a tensor of the shape {tuple(scores.shape)} of scores"
            )
        cleared = _cleared(found.detach().double(), valid)
        if not cleared.isfinite().all():
            raise plugin.failure(f"returned an advantage that is not finite for the scores {scores.tolist()}")
        return cleared

    return advantages


def _cleared(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, values, torch.zeros_like(values))


_ESTIMATORS: dict[str, AdvantageFn] = {
    "group-normalised": group_normalized,
    "mean-centred": mean_centered,
    "leave-one-out": leave_one_out,
    "batch-normalised": batch_normalized,
    "group-centred-batch-normalised": group_centered_batch_normalized,
}
