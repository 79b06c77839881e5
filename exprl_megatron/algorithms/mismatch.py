"""How far the trainer's log-probs are from those that the sampler reported for the same tokens."""

from dataclasses import dataclass

import torch

from exprl_megatron.algorithms.losses import k3_divergence


@dataclass(frozen=True)
class LogProbGap:
    """Sums over the masked tokens and the largest difference; scalar tensors, to be reduced over ranks."""

    absolute: torch.Tensor
    """Sum of |trainer - sampler|, in nats."""
    largest: torch.Tensor
    """Maximum of |trainer - sampler|; 0 where no token is masked in."""
    k3: torch.Tensor
    """Sum of the k3 estimate of KL(sampler || trainer)."""


def log_prob_gap(log_probs: torch.Tensor, sampler_log_probs: torch.Tensor, mask: torch.Tensor) -> LogProbGap:
    """The gap over the tokens where `mask` is 1; all three tensors have the same shape."""
    log_probs = log_probs.detach()
    absolute = (log_probs - sampler_log_probs).abs() * mask
    # The tokens were drawn from the sampler, so the estimate is of KL(sampler || trainer).
    k3 = k3_divergence(sampler_log_probs, log_probs) * mask
    return LogProbGap(absolute.sum(), absolute.max(), k3.sum())
