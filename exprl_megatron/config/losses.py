"""The loss of a policy-gradient update."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from exprl_megatron.config.base import Config
from exprl_megatron.config.plugin_path import PluginPath, choice_or_plugin

Advantage = Literal[
    "group-normalized", "mean-centered", "leave-one-out", "batch-normalized", "group-centered-batch-normalized"
]
"""Advantage of a trace from its score: GRPO, Dr. GRPO and ExpRL's stage 2, RLOO, REINFORCE++ and its baseline
variant."""

AdvantageOrPlugin = Annotated[Advantage | PluginPath, choice_or_plugin(get_args(Advantage))]
"""One of the built-in ones, or a function of your own (docs/extending.md)."""

Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum", "constant-length", "micro-batch-mean"]
"""Aggregation of token losses. Over all sequences of the update: `token-mean` (DAPO), `sequence-mean` the mean
over sequences of their token means (GRPO), `sequence-sum` the sum over tokens by the number of sequences (ExpRL's
stage 2 and its paper's equation 1), `constant-length` the same divided by max_new_tokens (Dr. GRPO).
`micro-batch-mean` is the released ExpRL code's, set by `reproduce: released`: token means of micro-batches, weighted by
their sequences, so that it depends on packing."""


RatioLevel = Literal["token", "sequence", "geometric"]
"""Level of an importance ratio: each token, the whole response (product), or its geometric mean."""


class CorrectionConfig(Config):
    """Importance weights for the difference between the policy that sampled a token and the old policy of the loss."""

    kind: Literal["none", "truncated", "masked"] = "none"
    """`truncated` (TIS): the importance ratio up to `high`; `masked` (IcePop): 0 outside of `low` to `high`."""
    level: RatioLevel = "token"
    """Whether a weight is that of a token, of a sequence (product of its tokens' ratios) or of their geometric mean."""
    low: float = Field(0.5, ge=0, le=1)
    """Lower bound of the ratio, used only by `masked`."""
    high: float = Field(2.0, ge=1)
    """Upper bound of the weights."""


class RejectionConfig(Config):
    """Rejection of tokens whose sampling policy is too far from the policy that learns."""

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    """Leave out the tokens, or the whole sequences, whose importance ratio is outside of `low` to `high` (verl's
    `rollout_rs`, slime's `rs_level`). It need not be the level of `correction`."""
    low: float = Field(0.5, ge=0, le=1)
    """Ratios below this are rejected."""
    high: float = Field(2.0, ge=1)
    """Ratios above this are rejected."""
    off_policy_threshold: float | None = Field(None, gt=0)
    """DeepSeek-V3.2's off-policy sequence mask (TRL's `off_policy_mask_threshold`, slime's `--opsm-delta`): tokens with
    a negative advantage are left out of sequences whose mean log(sampling policy / policy) is more than this, in nats a
    token."""
    in_denominator: bool = True
    """Whether rejected tokens (by `correction.kind: masked` too) still count where the loss is divided by tokens or
    sequences, and have KL and entropy terms, as in the papers; false: they are treated as not sampled (verl)."""

    @property
    def rejects(self) -> bool:
        """Whether this section can reject anything."""
        return self.level != "none" or self.off_policy_threshold is not None


Surrogate = Literal["clip", "sequence-clip", "clipped-weight"]
"""The policy's loss of each token."""


class LossConfig(Config):
    """Clipped policy gradient with an optional KL term to the stage's reference policy."""

    surrogate: Annotated[Surrogate | PluginPath, choice_or_plugin(get_args(Surrogate))] = "clip"
    """PPO's clip of token ratios; GSPO's of sequence ratios; CISPO's detached clipped weight; or a function of your own
    (docs/extending.md)."""
    clip_low: float = Field(0.2, gt=0)
    """The lower clip bound is 1 - clip_low; from 1 on there is none (as in CISPO). GSPO's paper: 3e-4."""
    clip_high: float = Field(0.28, gt=0)
    """Ratios count up to 1 + clip_high. GSPO's paper: 4e-4."""
    dual_clip: float | None = Field(3.0, gt=1)
    """Upper bound of the loss where the advantage is negative, in units of the advantage."""
    kl_coefficient: float = Field(1e-3, ge=0)
    """Weight of the KL divergence from the reference policy; 0: there is none."""
    kl_gradient: Literal["k3", "unbiased"] = "k3"
    """Gradient of the KL term: that of the k3 estimate, in expectation of KL(reference || policy) (as released), or an
    unbiased one of KL(policy || reference)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    aggregation: Aggregation = "token-mean"
    """How the losses of tokens become one number (docs/algorithms.md)."""
    correction: CorrectionConfig = CorrectionConfig()
    """Importance weights of the surrogate; the KL term and the entropy bonus have none."""
    rejection: RejectionConfig = RejectionConfig()
    use_rollout_log_probs: bool = False
    """Compute the surrogate's ratio to the sampling policy, from the log-probs that the servers reported, instead of
    to the trainer's policy before the update (slime's `--use-rollout-logprobs`, verl's bypass mode). The clip then also
    bounds staleness and the gap between sampler and trainer."""

    @property
    def corrects(self) -> bool:
        """Whether the loss corrects for tokens that another policy sampled than the one that learns."""
        return self.correction.kind != "none" or self.use_rollout_log_probs

    def violations(self, run_config) -> list[str]:
        found = []
        if self.surrogate != "clip" and self.dual_clip is not None:
            found.append(f"loss.dual_clip belongs to the surrogate clip, not to {self.surrogate}; set it to null.")
        if self.use_rollout_log_probs and self.correction.kind != "none":
            found.append(
                f"loss.use_rollout_log_probs is true, but loss.correction.kind is {self.correction.kind}, and both "
                "correct for the policy that sampled; set one of them to its default."
            )
        return found + ([] if self.rejection.in_denominator else self._denominator_violations(run_config))

    def _denominator_violations(self, run_config) -> list[str]:
        found = []
        if not self.rejection.rejects and self.correction.kind != "masked":
            found.append(
                "loss.rejection.in_denominator is false, but nothing is rejected; set loss.rejection.level, "
                "loss.rejection.off_policy_threshold or loss.correction.kind: masked, or leave it out."
            )
        if run_config.policy.moe_aux_loss:
            found.append(
                "loss.rejection.in_denominator is false, which rescales the gradient of an update, and with it that of "
                f"policy.moe_aux_loss ({run_config.policy.moe_aux_loss:g}); set one of them to its default."
            )
        return found


class SparseLossConfig(LossConfig):
    """The loose clip of the sparse-reward stage: ratios up to 5, no lower bound, no KL, summed over tokens."""

    clip_low: float = Field(4.0, gt=0)
    clip_high: float = Field(4.0, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    kl_coefficient: float = Field(0.0, ge=0)
    entropy_coefficient: float = Field(1e-4, ge=0)
    aggregation: Aggregation = "sequence-sum"
