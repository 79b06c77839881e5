"""Train-inference mismatch: the trainer's log-probs compared with those that the servers reported."""

from dataclasses import dataclass

import torch

from exprl_megatron.algorithms.losses import k3_divergence


@dataclass(frozen=True)
class LogProbGap:
    """Sums over the tokens of a mask, and the largest difference; scalar tensors that the caller reduces over ranks."""

    absolute: torch.Tensor
    """Sum of |trainer - sampler|, in nats."""
    largest: torch.Tensor
    """Maximum of |trainer - sampler|; 0 where `mask` is 0 everywhere."""
    k3: torch.Tensor
    """Sum of the k3 estimate of KL(sampler || trainer)."""


def log_prob_gap(log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor) -> LogProbGap:
    """Compute the gap over the tokens where `mask` is 1; all three tensors are [B, T]."""
    log_probs = log_probs.detach()
    absolute = (log_probs - rollout_log_probs).abs() * mask
    # The sampler drew the tokens, so the estimate is of KL(sampler || trainer).
    k3 = k3_divergence(rollout_log_probs, log_probs) * mask
    return LogProbGap(absolute.sum(), absolute.max(), k3.sum())
