"""Per-token losses. All tensors have one shape [B, T], one row for each sequence, and a float dtype.

Only functions that aggregate over whole sequences use a mask.
"""

import torch

LOG_RATIO_BOUND = 20.0
KL_BOUND = 10.0


def probability_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    """Compute exp(log_prob - old_log_prob) [B, T], with the exponent clamped to +-20, so that it stays finite."""
    return torch.exp((log_probs - old_log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def sequence_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute GSPO's ratio of a sequence, at each of its tokens (arXiv 2507.18071, the form of its section GSPO-token).

    s_i = (p(y_i) / p_old(y_i))^(1 / |y_i|), the geometric mean of the token ratios over the response tokens
    (where `mask` is 1). Token t gets sg[s_i] p_t / sg[p_t]: the value s_i, with the gradient of its own log-prob.
    Where a sequence's advantages are equal, the mean over its tokens has GSPO's value and gradient,
    s_i A_i (1 / |y_i|) sum_t grad log p_t; where they differ, each token has its own advantage.
    """
    difference = (log_probs - old_log_probs).detach() * mask
    mean = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    value = torch.exp(mean.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    return value * torch.exp(log_probs - log_probs.detach())


def clipped_policy_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute PPO's clipped surrogate as a loss [B, T], and 1.0 where a clip determines a token's loss [B, T].

    loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (arXiv 1707.06347); with `dual_clip` c
    the loss of a negative advantage is at most -A c (arXiv 1912.09729). `ratio` is the ratio of tokens or,
    for GSPO, of sequences.
    """
    plain = -advantages * ratio
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        bounded = torch.minimum(loss, -advantages * dual_clip)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss, (loss != plain).to(loss.dtype)


def clipped_weight_loss(
    log_probs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of CISPO (arXiv 2506.13585), and 1.0 where the weight was clipped: both [B, T].

    loss = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A log p: the importance weight is clipped and detached, so that
    every token keeps a gradient. The paper sets no lower bound: a clip_low of 1 or more.
    """
    weight = ratio.detach()
    bounded = weight.clamp(1 - clip_low, 1 + clip_high)
    return -bounded * advantages * log_probs, (bounded != weight).to(weight.dtype)


def distillation_loss(log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ExpRL's self-distillation loss (arXiv 2606.17024), d log p, and d = sg[log p - log p_teacher]: [B, T].

    On the student's own samples the gradient estimates the gradient of the sum over tokens of KL(student || teacher),
    with each token's context fixed: no baseline, no credit for later tokens. The mean of d estimates that KL.
    """
    difference = log_probs.detach() - teacher_log_probs
    return difference * log_probs, difference


def k3_divergence(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """Compute the k3 estimate [B, T] of KL(policy || other) from the policy's samples: e^d - d - 1, d = other - policy.

    It is differentiable in both arguments; d is clamped to +-20 and the estimate to +-10
    (J. Schulman, "Approximating KL divergence", 2020; the bounds are ExpRL's).
    """
    difference = (other_log_probs - log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (torch.exp(difference) - difference - 1).clamp(-KL_BOUND, KL_BOUND)


def unbiased_divergence(
    log_probs: torch.Tensor, other_log_probs: torch.Tensor, old_log_probs: torch.Tensor
) -> torch.Tensor:
    """Compute the value of k3_divergence with the gradient sg[r (log p - log other)] d log p, r = p / p_old.

    On samples of p_old it is, in expectation, the gradient of each token's KL(policy || other) with a fixed context;
    the gradient of k3 itself is the gradient of KL(other || policy). Source: the score-function form of the gradient
    of KL, weighted as in DeepSeek-V3.2 (arXiv 2512.02556), where r corrects for several updates per step.
    """
    fixed = log_probs.detach()
    difference = (fixed - other_log_probs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    slope = probability_ratio(fixed, old_log_probs) * difference
    return k3_divergence(fixed, other_log_probs) + slope * (log_probs - fixed)
