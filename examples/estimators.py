"""Advantage estimators: `advantage: examples.estimators:FUNCTION` of a stage."""

import torch


def median_centered(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A_i = r_i - median of the group's valid rewards: one lucky trace does not make the others worse.

    Args:
        rewards: [groups, traces], float64; of abstentions 0.
        valid: [groups, traces], bool: False for abstentions, whose advantages are ignored.
    """
    known = rewards.masked_fill(~valid, torch.nan)
    return (rewards - known.nanmedian(dim=-1, keepdim=True).values).nan_to_num()
