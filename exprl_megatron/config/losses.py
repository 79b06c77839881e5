"""What a step minimises."""

from typing import Literal

from pydantic import Field

from exprl_megatron.config.base import Config

Advantage = Literal[
    "group-normalised", "mean-centred", "leave-one-out", "batch-normalised", "group-centred-batch-normalised"
]
"""From one score a trace to its advantage: GRPO, Dr. GRPO and ExpRL's stage 2, RLOO, REINFORCE++ and its baseline
variant."""

Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum", "constant-length", "micro-batch-mean"]
"""From losses of tokens to one number. Over all sequences of the update: `token-mean` (DAPO), `sequence-mean` the mean
over sequences of their token means (GRPO), `sequence-sum` the sum over tokens by the number of sequences (ExpRL's
stage 2 and its paper's equation 1), `constant-length` the same divided by max_new_tokens (Dr. GRPO).
`micro-batch-mean` is the released ExpRL code's, set by `reproduce: released`: token means of micro-batches, weighted by
their sequences, so that it depends on packing."""


RatioLevel = Literal["token", "sequence", "geometric"]
"""Of what an importance ratio is taken: each token, the whole response (product), or its geometric mean."""


class CorrectionConfig(Config):
    """Weights for the gap between the policy that sampled a token and the one that the loss starts from."""

    kind: Literal["none", "truncated", "masked"] = "none"
    """The importance ratio up to `high`; or 0 outside of `low` to `high`."""
    level: RatioLevel = "token"
    low: float = Field(0.5, ge=0, le=1)
    """Of `masked` alone."""
    high: float = Field(2.0, ge=1)


class RejectionConfig(Config):
    """Tokens that are left out since the policy that sampled them is too far away; weights are CorrectionConfig's."""

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    """Leave out the tokens, or the whole sequences, whose importance ratio is outside of `low` to `high` (verl's
    `rollout_rs`, slime's `rs_level`). It need not be the level of `correction`."""
    low: float = Field(0.5, ge=0, le=1)
    high: float = Field(2.0, ge=1)
    off_policy_threshold: float | None = Field(None, gt=0)
    """DeepSeek-V3.2's off-policy sequence mask (TRL's `off_policy_mask_threshold`, slime's `--opsm-delta`): tokens with
    a negative advantage are left out of sequences in which log(sampler / policy) is more than this on average, in nats
    a token."""
    in_denominator: bool = True
    """Whether what is left out (by `correction.kind: masked` too) still counts where the loss is divided by tokens or
    sequences, and has its KL and entropy terms, as in the papers; false: it is as if it had not been sampled (verl)."""

    @property
    def rejects(self) -> bool:
        """Whether anything can be left out by this section."""
        return self.level != "none" or self.off_policy_threshold is not None


class LossConfig(Config):
    """Clipped policy gradient with an optional KL term to the stage's starting policy."""

    surrogate: Literal["clip", "sequence-clip", "clipped-weight"] = "clip"
    """PPO's clip of token ratios; GSPO's of sequence ratios; CISPO's detached clipped weight."""
    clip_low: float = Field(0.2, gt=0)
    """Ratios count down to 1 - clip_low; from 1 on there is no lower bound (as CISPO has it). GSPO's paper: 3e-4."""
    clip_high: float = Field(0.28, gt=0)
    """Ratios count up to 1 + clip_high. GSPO's paper: 4e-4."""
    dual_clip: float | None = Field(3.0, gt=1)
    """Bound of the loss where the advantage is negative, in units of the advantage."""
    kl_coefficient: float = Field(1e-3, ge=0)
    kl_gradient: Literal["k3", "unbiased"] = "k3"
    """Of the KL term: that of the k3 estimate, in expectation the gradient of KL(start || policy) (as released), or an
    unbiased one of KL(policy || start)."""
    entropy_coefficient: float = Field(0.0, ge=0)
    aggregation: Aggregation = "token-mean"
    correction: CorrectionConfig = CorrectionConfig()
    """Of the surrogate alone, not of the KL term nor the entropy bonus."""
    rejection: RejectionConfig = RejectionConfig()
    use_rollout_log_probs: bool = False
    """Take the surrogate's ratio to the policy that sampled, by the log-probs that the servers reported, instead of to
    the trainer's before the update (slime's `--use-rollout-logprobs`, verl's bypass mode). The clip then also bounds
    staleness and the gap between sampler and trainer."""

    @property
    def corrects(self) -> bool:
        """Whether the loss makes up for tokens that another policy sampled than the one that learns."""
        return self.correction.kind != "none" or self.use_rollout_log_probs

    def violations(self, whole) -> list[str]:
        found = []
        if self.surrogate != "clip" and self.dual_clip is not None:
            found.append(f"loss.dual_clip belongs to the surrogate clip, not to {self.surrogate}; set it to null.")
        if self.use_rollout_log_probs and self.correction.kind != "none":
            found.append(
                f"loss.use_rollout_log_probs is true, but loss.correction.kind is {self.correction.kind}, and both "
                "correct for the policy that sampled; set one of them to its default."
            )
        return found + ([] if self.rejection.in_denominator else self._denominator_violations(whole))

    def _denominator_violations(self, whole) -> list[str]:
        found = []
        if not self.rejection.rejects and self.correction.kind != "masked":
            found.append(
                "loss.rejection.in_denominator is false, but nothing is rejected; set loss.rejection.level, "
                "loss.rejection.off_policy_threshold or loss.correction.kind: masked, or leave it out."
            )
        if whole.policy.moe_aux_loss:
            found.append(
                "loss.rejection.in_denominator is false, which rescales the gradient of an update, and with it that of "
                f"policy.moe_aux_loss ({whole.policy.moe_aux_loss:g}); set one of them to its default."
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
