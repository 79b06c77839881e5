"""Weights for tokens that another policy sampled than the one that the loss takes for the old one.

The sampler's own log-probs say what drew a token: older weights, where sampling runs ahead, or the same weights in
another implementation. With b that behaviour and p_old the policy that PPO's ratio p / p_old starts from, the
policy's loss of each token is multiplied by an estimate of p_old / b, detached: the decoupled objective of Hilton et
al. (arXiv 2110.00641) and AReaL (arXiv 2505.24298). Without old log-probs p_old is the current policy, and the weight
is all of the importance ratio. A token counts with the log-prob that it was drawn with, so that weights may have
changed in the midst of a trace.

All tensors are [batch, length], a row for each sequence.
"""

import torch

from exprl_megatron.algorithms.losses import LOG_RATIO_BOUND
from exprl_megatron.config.losses import CorrectionConfig, RatioLevel


def correction_weights(
    config: CorrectionConfig, old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The config's weight of each token, and the ratio that it was made of; both detached.

    `config.kind` is not `none`.
    """
    ratio = importance_ratio(old_log_probs.detach(), sampler_log_probs, mask, config.level)
    if config.kind == "truncated":
        return truncated(ratio, config.high), ratio
    return masked(ratio, config.low, config.high), ratio


def importance_ratio(
    old_log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, mask: torch.Tensor, level: RatioLevel
) -> torch.Tensor:
    """p_old / b at each token, the exponent held within +-20; `mask` is 1.0 at response tokens.

    token: of the token alone. It leaves out how likely the tokens before it were (first-order in the gap).
    sequence: the product over the response, at each of its tokens; exact, with a variance that grows with length
    (Liu, Li et al., "When Speed Kills Stability", 2025).
    geometric: the product's 1 / tokens-th power, as GSPO's ratio (arXiv 2507.18071): no estimate of the ratio but
    the mean distance of a token, whatever the length, to bound sequences by.
    """
    difference = (old_log_probs - sampler_log_probs) * mask
    if level != "token":
        total = difference.sum(-1, keepdim=True)
        if level == "geometric":
            total = total / mask.sum(-1, keepdim=True).clamp(min=1)
        difference = total.expand_as(difference)
    return torch.exp(difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def truncated(ratio: torch.Tensor, high: float) -> torch.Tensor:
    """min(ratio, high): truncated importance sampling (Ionides 2008; for language models Yao et al., "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training", 2025)."""
    return ratio.clamp(max=high)


def masked(ratio: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The ratio where low <= ratio <= high, else 0: at the token level IcePop (Ring-1T, arXiv 2510.18855), at the
    sequence level masked importance sampling (Liu, Li et al. 2025)."""
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))
