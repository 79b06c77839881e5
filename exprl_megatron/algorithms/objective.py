"""What a training step minimises: functions from a micro-batch's log-probs to its summed loss and metrics.

Losses and metrics are sums over the micro-batch's response tokens, maxima where the name ends in `/max`.
Whoever calls divides the sums by the number of response tokens over all micro-batches and data-parallel
ranks, so that the result depends neither on packing nor on the layout.
"""

from collections.abc import Callable

import torch

from exprl_megatron.algorithms.losses import clipped_policy_loss, k3_divergence, probability_ratio
from exprl_megatron.algorithms.mismatch import log_prob_gap
from exprl_megatron.config.losses import LossConfig
from exprl_megatron.policy.batch import MicroBatch

LossFunction = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(log_probs [b, l], entropy [b, l], micro-batch) -> (loss sum, {metric: detached sum or maximum}), scalar tensors."""


def policy_objective(config: LossConfig) -> LossFunction:
    """Clipped policy gradient, plus the KL to the starting policy, minus the entropy bonus.

    The micro-batch needs advantages; old log-probs default to the current ones, detached (strictly
    on-policy); start log-probs are needed where `kl_coefficient` is not 0 (ValueError without them).
    The gap to the sampler is measured on the old log-probs: those belong to the weights that sampled.
    """

    def loss_function(log_probs, entropy, micro):
        old = log_probs.detach() if micro.old_log_probs is None else micro.old_log_probs
        ratio = probability_ratio(log_probs, old)
        policy, clipped = clipped_policy_loss(
            ratio, micro.advantages, config.clip_low, config.clip_high, config.dual_clip
        )
        terms = {
            "loss/policy": policy,
            "entropy": entropy,
            "ratio": ratio,
            "clip_share": clipped,
            "kl/old": k3_divergence(log_probs, old),
        }
        total = policy
        if config.entropy_coefficient:
            total = total - config.entropy_coefficient * entropy
        if micro.start_log_probs is not None:
            terms["kl/start"] = k3_divergence(log_probs, micro.start_log_probs)
            total = total + config.kl_coefficient * terms["kl/start"]
        elif config.kl_coefficient:
            raise ValueError("the loss has a KL term, but the batch carries no log-probs of the starting policy")
        metrics = {name: _sum(value.detach(), micro.mask) for name, value in terms.items()}
        if micro.sampler_log_probs is not None:
            gap = log_prob_gap(old, micro.sampler_log_probs, micro.mask)
            metrics |= {"sampler_gap/mean": gap.absolute, "sampler_gap/max": gap.largest, "sampler_gap/k3": gap.k3}
        loss = _sum(total, micro.mask)
        return loss, metrics | {"loss": loss.detach()}

    return loss_function


def supervised_objective() -> LossFunction:
    """Negative log-likelihood of the response tokens, in nats."""

    def loss_function(log_probs, entropy, micro):
        loss = _sum(-log_probs, micro.mask)
        return loss, {"loss": loss.detach(), "entropy": _sum(entropy.detach(), micro.mask)}

    return loss_function


def _sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum()
