"""Which tokens the loss leaves out, since the policy that sampled them is too far from the one that learns.

A rejection has no weights; importance weights (corrections.py) may be of another level than it. All tensors are
[batch, length], a row for each sequence.
"""

import torch

from exprl_megatron.algorithms.corrections import importance_ratio
from exprl_megatron.config.losses import RejectionConfig


def kept_tokens(
    config: RejectionConfig,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    sampler_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """1.0 where a token is kept, else 0.0; outside of `mask` (1.0 at response tokens) it means nothing.

    `old_log_probs` are the trainer's before the update, whose ratio to the sampler's has the bounds of `level`;
    `log_probs` the current ones, which the off-policy threshold is for.
    """
    kept = torch.ones_like(mask)
    if config.level != "none":
        ratio = importance_ratio(old_log_probs.detach(), sampler_log_probs, mask, config.level)
        kept = kept * ((ratio >= config.low) & (ratio <= config.high))
    if config.off_policy_threshold is not None:
        kept = kept * off_policy_mask(log_probs, sampler_log_probs, advantages, mask, config.off_policy_threshold)
    return kept


def off_policy_mask(
    log_probs: torch.Tensor,
    sampler_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """DeepSeek-V3.2's M of each token (arXiv 2512.02556, equation 9).

    0 where the token's advantage is negative and the mean of log(b / p) over its sequence is above `threshold`, else 1;
    b is what the sampler reported, so that the gap between sampler and trainer counts as well as later updates do.
    """
    gap = (sampler_log_probs - log_probs.detach()) * mask
    mean = gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return 1.0 - ((advantages < 0) & (mean > threshold)).to(mask.dtype)
