"""Per-token losses. All tensors have one shape, usually [batch, length], and a float dtype; nothing is masked here."""

import torch

LOG_RATIO_BOUND = 20.0
KL_BOUND = 10.0


def probability_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    """exp(log_prob - old_log_prob), the exponent held within +-20 so that it stays finite."""
    return torch.exp((log_probs - old_log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def clipped_policy_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate as a loss, and 1.0 where a clip decides a token's loss.

    loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (arXiv 1707.06347); with `dual_clip` c
    the loss of a negative advantage is at most -A c (arXiv 1912.09729).
    """
    plain = -advantages * ratio
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        bounded = torch.minimum(loss, -advantages * dual_clip)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss, (loss != plain).to(loss.dtype)


def k3_divergence(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(policy || other) from the policy's samples: e^d - d - 1, d = other - policy.

    Differentiable in both; d is held within +-20 and the estimate within +-10
    (J. Schulman, "Approximating KL divergence", 2020; the bounds are ExpRL's).
    """
    difference = (other_log_probs - log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (torch.exp(difference) - difference - 1).clamp(-KL_BOUND, KL_BOUND)
