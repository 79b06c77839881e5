"""Objectives of a training step: functions from a micro-batch's log-probs to its summed loss and metrics.

A loss is a weighted sum over the micro-batch's response tokens. The caller divides the sum over all
micro-batches and data-parallel ranks by aggregation.denominator_of. Metrics named `loss` or `loss/...` are such
weighted sums too and have the same denominator; all others are plain sums over response tokens, to be divided by
their number, and maxima where the name ends in `/max`.
"""

import torch

from exprl_megatron.algorithms.aggregation import token_weights
from exprl_megatron.algorithms.batch import LossFunction, MicroBatch
from exprl_megatron.algorithms.corrections import correction_weights
from exprl_megatron.algorithms.losses import distillation_loss, k3_divergence, unbiased_divergence
from exprl_megatron.algorithms.mismatch import log_prob_gap
from exprl_megatron.algorithms.rejection import acceptance_mask
from exprl_megatron.algorithms.surrogates import surrogate
from exprl_megatron.config.losses import Aggregation, LossConfig


def policy_objective(config: LossConfig) -> LossFunction:
    """Build the objective of a config: surrogate + KL to the reference policy - entropy bonus, with one aggregation.

    Old log-probs default to the current ones, detached (strictly on-policy). With `use_rollout_log_probs` the ratio is
    to the rollout log-probs instead. The gap to the sampler is measured on the trainer's old log-probs, over the tokens
    that the same weights sampled (`on_policy_mask`). Rejected tokens have no policy loss; where they do not count in
    the denominator, they have no other term either, and the metrics `accepted/tokens` and `accepted/sequences` count
    the others.

    Raises:
        ValueError: (by the returned function) the micro-batch lacks an input: advantages, the log-probs of the
            reference policy where `kl_coefficient` is not 0, or the rollout log-probs where `use_rollout_log_probs`,
            `config.correction` or `config.rejection` needs them.
        PluginError: (by the returned function) the user's surrogate failed.
    """

    def loss_function(log_probs, entropy, micro):
        trained = log_probs.detach() if micro.old_log_probs is None else micro.old_log_probs
        old = _rollout_log_probs(micro) if config.use_rollout_log_probs else trained
        policy, ratio, clipped = surrogate(config, log_probs, old, micro)
        terms = {"entropy": entropy, "ratio": ratio, "clip_share": clipped, "kl/old": k3_divergence(log_probs, trained)}
        kept, found = torch.ones_like(micro.mask), {}
        if config.correction.kind != "none":
            weights, weighing, found = _corrected(config, old, micro)
            policy, kept, terms = policy * weights, (weights != 0).to(kept.dtype), terms | weighing
        if config.rejection.rejects:
            sampler = _rollout_log_probs(micro)
            kept = kept * acceptance_mask(config.rejection, log_probs, trained, sampler, micro.advantages, micro.mask)
            terms["rejected"] = 1.0 - kept
        policy = policy * kept
        total = policy
        if config.entropy_coefficient:
            total = total - config.entropy_coefficient * entropy
        if (divergence := _ref_divergence(config, log_probs, old, micro)) is not None:
            terms["kl/ref"] = divergence
            total = total + config.kl_coefficient * divergence
        counted = micro.mask
        if not config.rejection.in_denominator:
            counted = micro.mask * kept
            found |= {"accepted/tokens": counted.sum(), "accepted/sequences": (counted.sum(-1) > 0).sum()}
        weights = token_weights(counted, config.aggregation)
        loss = (total * weights).sum()
        metrics = _sums(terms, micro) | _rollout_gap(trained, micro) | found
        return loss, metrics | {"loss": loss.detach(), "loss/policy": (policy.detach() * weights).sum()}

    return loss_function


def distillation_objective(aggregation: Aggregation) -> LossFunction:
    """Build the objective of self-distillation; the micro-batch's reference log-probs are those of the frozen teacher.

    `kl/teacher` estimates KL(student || teacher) for each token.

    Raises:
        ValueError: (by the returned function) the micro-batch has no reference log-probs.
    """

    def loss_function(log_probs, entropy, micro):
        if micro.ref_log_probs is None:
            raise ValueError("self-distillation needs the teacher's log-probs, but the batch has none")
        values, difference = distillation_loss(log_probs, micro.ref_log_probs)
        loss = (values * token_weights(micro.mask, aggregation)).sum()
        metrics = _sums({"entropy": entropy, "kl/teacher": difference}, micro) | _rollout_gap(log_probs, micro)
        return loss, metrics | {"loss": loss.detach()}

    return loss_function


def supervised_objective() -> LossFunction:
    """Build the objective of SFT: the negative log-likelihood of response tokens in nats, for a mean over tokens."""

    def loss_function(log_probs, entropy, micro):
        loss = (-log_probs * micro.mask).sum()
        return loss, {"loss": loss.detach()} | _sums({"entropy": entropy}, micro)

    return loss_function


def _ref_divergence(
    config: LossConfig, log_probs: torch.Tensor, old: torch.Tensor, micro: MicroBatch
) -> torch.Tensor | None:
    """Compute per token the divergence from the reference policy [B, T]; None where the batch lacks its log-probs."""
    if micro.ref_log_probs is None:
        if config.kl_coefficient:
            raise ValueError("the loss has a KL term, but the batch has no log-probs of the reference policy")
        return None
    if config.kl_gradient == "unbiased":
        return unbiased_divergence(log_probs, micro.ref_log_probs, old)
    return k3_divergence(log_probs, micro.ref_log_probs)


def _rollout_log_probs(micro: MicroBatch) -> torch.Tensor:
    if micro.rollout_log_probs is None:
        raise ValueError(
            "the loss compares with the policy that sampled, but the batch has no log-probs of the sampler"
        )
    return micro.rollout_log_probs


def _corrected(
    config: LossConfig, old: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compute the weight of each token [B, T], terms for the metrics, and the largest ratio."""
    weights, ratio = correction_weights(config.correction, old, _rollout_log_probs(micro), micro.mask)
    terms = {
        "correction/weight": weights,
        "correction/squared": weights.square(),
        "correction/bounded": (weights != ratio).to(weights.dtype),
    }
    return weights, terms, {"correction/ratio/max": (ratio * micro.mask).amax()}


def _sums(terms: dict[str, torch.Tensor], micro: MicroBatch) -> dict[str, torch.Tensor]:
    return {name: (value.detach() * micro.mask).sum() for name, value in terms.items()}


def _rollout_gap(log_probs: torch.Tensor, micro: MicroBatch) -> dict[str, torch.Tensor]:
    """Measure the gap over the tokens that the current weights sampled, and count these where they are not all."""
    if micro.rollout_log_probs is None:
        return {}
    mask = micro.mask if micro.on_policy_mask is None else micro.mask * micro.on_policy_mask
    gap = log_prob_gap(log_probs, micro.rollout_log_probs, mask)
    found = {"sampler_gap/mean": gap.absolute, "sampler_gap/max": gap.largest, "sampler_gap/k3": gap.k3}
    return found if micro.on_policy_mask is None else found | {"sampler_gap/tokens": mask.sum()}
