"""The policy's loss of each token: a built-in surrogate, or the user's (docs/extending.md)."""

from dataclasses import dataclass
from typing import get_args

import torch

from exprl_megatron.algorithms.batch import MicroBatch
from exprl_megatron.algorithms.losses import (
    clipped_policy_loss,
    clipped_weight_loss,
    probability_ratio,
    sequence_ratio,
)
from exprl_megatron.config.losses import LossConfig, Surrogate
from exprl_megatron.plugins.calling import Plugin, described


@dataclass(frozen=True)
class SurrogateBatch:
    """The inputs of a surrogate. All tensors are [B, T], float32, one row for each trace.

    Values outside of the response, where `mask` is 0, are undefined and do not count.
    """

    log_probs: torch.Tensor
    """Log-probs of the sampled tokens under the policy that learns, with gradient."""
    old_log_probs: torch.Tensor
    """Log-probs before the step's updates (the sampler's with `use_rollout_log_probs`), without gradient."""
    advantages: torch.Tensor
    mask: torch.Tensor
    """1.0 for each token of the response."""
    clip_low: float
    clip_high: float
    """`loss.clip_low` and `loss.clip_high` of the stage."""


def surrogate(
    config: LossConfig, log_probs: torch.Tensor, old: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute per token the policy's loss, its ratio, and 1.0 where the ratio was clipped: each [B, T].

    Raises:
        ValueError: the micro-batch has no advantages.
        PluginError: the user's surrogate failed, or did not return a loss for each token.
    """
    if micro.advantages is None:
        raise ValueError("the policy's loss needs advantages, but the batch has none")
    if config.surrogate not in get_args(Surrogate):
        loss = custom_surrogate(config.surrogate, _batch(config, log_probs, old, micro))
        return loss, probability_ratio(log_probs, old), torch.zeros_like(loss)
    if config.surrogate == "sequence-clip":
        ratio = sequence_ratio(log_probs, old, micro.mask)
    else:
        ratio = probability_ratio(log_probs, old)
    if config.surrogate == "clipped-weight":
        loss, clipped = clipped_weight_loss(log_probs, ratio, micro.advantages, config.clip_low, config.clip_high)
    else:
        loss, clipped = clipped_policy_loss(
            ratio, micro.advantages, config.clip_low, config.clip_high, config.dual_clip
        )
    return loss, ratio, clipped


def custom_surrogate(path: str, batch: SurrogateBatch) -> torch.Tensor:
    """Compute the loss of each token [B, T] by the user's function; 0 outside of the responses.

    Raises:
        PluginError: the function failed, or did not return a tensor [B, T] of finite numbers with a gradient.
    """
    plugin = Plugin.load("loss.surrogate", path)
    plugin.check_arguments(("batch",))
    inside = batch.mask > 0
    loss = plugin(batch)
    shape = tuple(batch.log_probs.shape)
    if not isinstance(loss, torch.Tensor) or tuple(loss.shape) != shape:
        raise plugin.failure(f"returned {described(loss)} instead of a tensor of the shape {shape} of log_probs")
    if batch.log_probs.requires_grad and not loss.requires_grad:
        raise plugin.failure("returned a loss without a gradient; compute it from batch.log_probs")
    if not loss.is_floating_point() or loss.device != inside.device:
        raise plugin.failure(f"returned a loss of {loss.dtype} on {loss.device} instead of numbers on {inside.device}")
    cleared = torch.where(inside, loss, torch.zeros_like(loss)).float()
    # Where the model itself gives what is not finite, the gradient's check says so.
    wrong = ~cleared.isfinite() & batch.log_probs.isfinite() & batch.old_log_probs.isfinite()
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        inputs = f"log-probs {batch.log_probs[place].item():.4g} and {batch.old_log_probs[place].item():.4g} (old)"
        raise plugin.failure(f"returned the loss {cleared[place].item()} for a token with {inputs}")
    return cleared


def _batch(config: LossConfig, log_probs: torch.Tensor, old: torch.Tensor, micro: MicroBatch) -> SurrogateBatch:
    assert micro.advantages is not None
    # Copies: what the function does to them reaches neither the KL term nor the aggregation.
    advantages, mask = micro.advantages.clone(), micro.mask.clone()
    return SurrogateBatch(log_probs.clone(), old.detach().clone(), advantages, mask, config.clip_low, config.clip_high)
