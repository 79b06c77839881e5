"""Rejection of tokens whose sampling policy is too far from the policy that learns (verl's rollout_rs).

Rejection has no weights, and its level may differ from that of the importance weights (corrections.py). Tensors are
[B, T], one row for each sequence.
"""

import torch

from exprl_megatron.algorithms.corrections import importance_ratio
from exprl_megatron.config.losses import RejectionConfig


def acceptance_mask(
    config: RejectionConfig,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Compute which tokens are accepted: [B, T], 1.0 or 0.0; undefined outside of `mask` (1.0 at response tokens).

    Args:
        config: the bounds.
        log_probs: [B, T], current log-probs, for the off-policy threshold.
        old_log_probs: [B, T], the trainer's log-probs before the update; `config.level` bounds their ratio to the
            sampler's.
        rollout_log_probs: [B, T], log-probs that the servers reported.
        advantages: [B, T].
        mask: [B, T], 1.0 at response tokens.
    """
    kept = torch.ones_like(mask)
    if config.level != "none":
        ratio = importance_ratio(old_log_probs.detach(), rollout_log_probs, mask, config.level)
        kept = kept * ((ratio >= config.low) & (ratio <= config.high))
    if config.off_policy_threshold is not None:
        kept = kept * off_policy_mask(log_probs, rollout_log_probs, advantages, mask, config.off_policy_threshold)
    return kept


def off_policy_mask(
    log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """Compute DeepSeek-V3.2's off-policy mask M of each token: [B, T] (arXiv 2512.02556, equation 9).

    M is 0 where the token's advantage is negative and the mean of log(b / p) over its sequence is above `threshold`
    (nats per token), else 1. b is the probability that the sampler reported, so that M depends on the gap between
    sampler and trainer as well as on later updates.
    """
    gap = (rollout_log_probs - log_probs.detach()) * mask
    mean = gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return 1.0 - ((advantages < 0) & (mean > threshold)).to(mask.dtype)
