"""What a training step minimises: functions from a micro-batch's log-probs to its summed loss and metrics.

A loss is a weighted sum over the micro-batch's response tokens; whoever calls divides the sum over all
micro-batches and data-parallel ranks by aggregation.denominator. Metrics named `loss` or `loss/...` are such
weighted sums too and have the same denominator; all others are plain sums over response tokens, to be divided by
their number, and maxima where the name ends in `/max`.
"""

from collections.abc import Callable

import torch

from exprl_megatron.algorithms.aggregation import token_weights
from exprl_megatron.algorithms.batch import MicroBatch
from exprl_megatron.algorithms.corrections import correction_weights
from exprl_megatron.algorithms.losses import (
    clipped_policy_loss,
    clipped_weight_loss,
    distillation_loss,
    k3_divergence,
    probability_ratio,
    sequence_ratio,
    unbiased_divergence,
)
from exprl_megatron.algorithms.mismatch import log_prob_gap
from exprl_megatron.algorithms.rejection import kept_tokens
from exprl_megatron.config.losses import Aggregation, LossConfig

LossFunction = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(log_probs [b, l], entropy [b, l], micro-batch) -> (loss sum, {metric: detached sum or maximum}), scalar tensors."""


def policy_objective(config: LossConfig) -> LossFunction:
    """The config's surrogate, plus the KL to the starting policy, minus the entropy bonus, all aggregated alike.

    The micro-batch needs advantages; old log-probs default to the current ones, detached (strictly
    on-policy); start log-probs are needed where `kl_coefficient` is not 0 (ValueError without them).
    With `use_rollout_log_probs` the ratio is to the sampler's log-probs instead (ValueError without them).
    The gap to the sampler is measured on the trainer's old log-probs, which belong to the weights that sampled, or to
    newer ones than those of tokens that are not `fresh`. `config.correction` and `config.rejection` need sampler
    log-probs (ValueError without them). What is rejected has no policy loss; where it does not count in the
    denominator either, it has no other term, and the metrics `kept/tokens` and `kept/sequences` count the others.
    """

    def loss_function(log_probs, entropy, micro):
        trained = log_probs.detach() if micro.old_log_probs is None else micro.old_log_probs
        old = _rollout_log_probs(micro) if config.use_rollout_log_probs else trained
        policy, ratio, clipped = _surrogate(config, log_probs, old, micro)
        terms = {"entropy": entropy, "ratio": ratio, "clip_share": clipped, "kl/old": k3_divergence(log_probs, trained)}
        kept, found = torch.ones_like(micro.mask), {}
        if config.correction.kind != "none":
            weights, weighing, found = _corrected(config, old, micro)
            policy, kept, terms = policy * weights, (weights != 0).to(kept.dtype), terms | weighing
        if config.rejection.rejects:
            sampler = _rollout_log_probs(micro)
            kept = kept * kept_tokens(config.rejection, log_probs, trained, sampler, micro.advantages, micro.mask)
            terms["rejected"] = 1.0 - kept
        policy = policy * kept
        total = policy
        if config.entropy_coefficient:
            total = total - config.entropy_coefficient * entropy
        if (divergence := _to_start(config, log_probs, old, micro)) is not None:
            terms["kl/start"] = divergence
            total = total + config.kl_coefficient * divergence
        counted = micro.mask
        if not config.rejection.in_denominator:
            counted = micro.mask * kept
            found |= {"kept/tokens": counted.sum(), "kept/sequences": (counted.sum(-1) > 0).sum()}
        weights = token_weights(counted, config.aggregation)
        loss = (total * weights).sum()
        metrics = _sums(terms, micro) | _sampler_gap(trained, micro) | found
        return loss, metrics | {"loss": loss.detach(), "loss/policy": (policy.detach() * weights).sum()}

    return loss_function


def distillation_objective(aggregation: Aggregation) -> LossFunction:
    """Self-distillation; the micro-batch's start log-probs are those of the frozen teacher, which saw the reference.

    `kl/teacher` estimates KL(student || teacher) for each token. Raises ValueError without start log-probs.
    """

    def loss_function(log_probs, entropy, micro):
        if micro.start_log_probs is None:
            raise ValueError("self-distillation needs the teacher's log-probs, but the batch carries none")
        values, difference = distillation_loss(log_probs, micro.start_log_probs)
        loss = (values * token_weights(micro.mask, aggregation)).sum()
        metrics = _sums({"entropy": entropy, "kl/teacher": difference}, micro) | _sampler_gap(log_probs, micro)
        return loss, metrics | {"loss": loss.detach()}

    return loss_function


def supervised_objective() -> LossFunction:
    """Negative log-likelihood of the response tokens, in nats; its aggregation is the token mean."""

    def loss_function(log_probs, entropy, micro):
        loss = (-log_probs * micro.mask).sum()
        return loss, {"loss": loss.detach()} | _sums({"entropy": entropy}, micro)

    return loss_function


def _surrogate(
    config: LossConfig, log_probs: torch.Tensor, old: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token: the policy's loss, the ratio that it is made with, and 1.0 where that was clipped."""
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


def _to_start(config: LossConfig, log_probs: torch.Tensor, old: torch.Tensor, micro: MicroBatch) -> torch.Tensor | None:
    """Per token the divergence from the stage's starting policy, where the batch has its log-probs."""
    if micro.start_log_probs is None:
        if config.kl_coefficient:
            raise ValueError("the loss has a KL term, but the batch carries no log-probs of the starting policy")
        return None
    if config.kl_gradient == "unbiased":
        return unbiased_divergence(log_probs, micro.start_log_probs, old)
    return k3_divergence(log_probs, micro.start_log_probs)


def _rollout_log_probs(micro: MicroBatch) -> torch.Tensor:
    if micro.sampler_log_probs is None:
        raise ValueError(
            "the loss compares with the policy that sampled, but the batch carries no log-probs of the sampler"
        )
    return micro.sampler_log_probs


def _corrected(
    config: LossConfig, old: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weight of each token; per token what the weights are, and the largest ratio."""
    weights, ratio = correction_weights(config.correction, old, _rollout_log_probs(micro), micro.mask)
    terms = {
        "correction/weight": weights,
        "correction/squared": weights.square(),
        "correction/bounded": (weights != ratio).to(weights.dtype),
    }
    return weights, terms, {"correction/ratio/max": (ratio * micro.mask).amax()}


def _sums(terms: dict[str, torch.Tensor], micro: MicroBatch) -> dict[str, torch.Tensor]:
    return {name: (value.detach() * micro.mask).sum() for name, value in terms.items()}


def _sampler_gap(log_probs: torch.Tensor, micro: MicroBatch) -> dict[str, torch.Tensor]:
    """Over the tokens that the weights of `log_probs` sampled themselves; how many these are, where not all."""
    if micro.sampler_log_probs is None:
        return {}
    mask = micro.mask if micro.fresh is None else micro.mask * micro.fresh
    gap = log_prob_gap(log_probs, micro.sampler_log_probs, mask)
    found = {"sampler_gap/mean": gap.absolute, "sampler_gap/max": gap.largest, "sampler_gap/k3": gap.k3}
    return found if micro.fresh is None else found | {"sampler_gap/tokens": mask.sum()}
