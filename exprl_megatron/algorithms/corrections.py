"""Importance weights for tokens whose sampling policy is not the old policy of the loss (TIS, IcePop).

The rollout log-probs are those of the policy that sampled a token: older weights in asynchronous runs, or the same
weights in another implementation. With b that policy and p_old the denominator of PPO's ratio p / p_old, the
policy's loss of each token is multiplied by an estimate of p_old / b, detached: the decoupled objective of Hilton et
al. (arXiv 2110.00641) and AReaL (arXiv 2505.24298). Without old log-probs p_old is the current policy, and the weight
is the full importance ratio. Each token has the log-prob with which it was sampled, so that weights may have
changed within a trace.

All tensors are [B, T], one row for each sequence.
"""

import torch

from exprl_megatron.algorithms.losses import LOG_RATIO_BOUND
from exprl_megatron.config.losses import CorrectionConfig, RatioLevel


def correction_weights(
    config: CorrectionConfig, old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the config's weight of each token and its importance ratio: both [B, T], detached.

    `mask` [B, T] is 1.0 at response tokens. `config.kind` must not be `none`.
    """
    ratio = importance_ratio(old_log_probs.detach(), rollout_log_probs, mask, config.level)
    if config.kind == "truncated":
        return truncated(ratio, config.high), ratio
    return masked(ratio, config.low, config.high), ratio


def importance_ratio(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor, level: RatioLevel
) -> torch.Tensor:
    """Compute p_old / b at each token [B, T], with the exponent clamped to +-20; `mask` is 1.0 at response tokens.

    token: the ratio of the single token, without the tokens before it (first-order in the difference).
    sequence: the product over the response, at each of its tokens; exact, with a variance that grows with length
    (Liu, Li et al., "When Speed Kills Stability", 2025).
    geometric: the product to the power of 1 / tokens, like GSPO's ratio (arXiv 2507.18071): not an estimate of the
    ratio but a mean distance of the tokens, independent of the length, by which sequences can be bounded.
    """
    difference = (old_log_probs - rollout_log_probs) * mask
    if level != "token":
        total = difference.sum(-1, keepdim=True)
        if level == "geometric":
            total = total / mask.sum(-1, keepdim=True).clamp(min=1)
        difference = total.expand_as(difference)
    return torch.exp(difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def truncated(ratio: torch.Tensor, high: float) -> torch.Tensor:
    """Compute min(ratio, high) [B, T]: truncated importance sampling (Ionides 2008).

    For language models: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
    """
    return ratio.clamp(max=high)


def masked(ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Compute the ratio where low <= ratio <= high, else 0 [B, T].

    At the token level this is IcePop (Ring-1T, arXiv 2510.18855), at the sequence level masked importance sampling
    (Liu, Li et al. 2025).
    """
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
