"""What a run does, one stage after the other; each starts from the weights that the one before left."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.serving import SamplingConfig


class LossConfig(Config):
    """Clipped policy gradient with an optional KL term to the stage's starting policy."""

    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float | None = Field(3.0, gt=1)
    """Bound of the loss where the advantage is negative, in units of the advantage."""
    kl_coefficient: float = Field(1e-3, ge=0)
    entropy_coefficient: float = Field(0.0, ge=0)


class SparseLossConfig(LossConfig):
    """The loose clip of the sparse-reward stage: ratios up to 5, no lower bound, no KL."""

    clip_low: float = Field(4.0, gt=0)
    clip_high: float = Field(4.0, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    kl_coefficient: float = Field(0.0, ge=0)
    entropy_coefficient: float = Field(1e-4, ge=0)


class Stage(Config):
    """What every stage has."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    steps: PositiveInt
    optimizer: OptimizerConfig = OptimizerConfig()


class RlStage(Stage):
    """What the stages that learn from their own traces share."""

    problems: ProblemsConfig
    problems_per_step: PositiveInt = 32
    group_size: PositiveInt = 16
    updates_per_step: PositiveInt = 1
    """Optimizer steps that one step's traces are split into."""
    sampling: SamplingConfig = SamplingConfig()
    loss: LossConfig = LossConfig()

    def violations(self, whole) -> list[str]:
        found = []
        if self.problems_per_step % self.updates_per_step:
            found.append(
                f"stage {self.name}: problems_per_step ({self.problems_per_step}) is not a multiple of "
                f"updates_per_step ({self.updates_per_step}); change one of them."
            )
        if self.sampling.max_new_tokens >= whole.policy.max_tokens:
            found.append(
                f"stage {self.name}: sampling.max_new_tokens ({self.sampling.max_new_tokens}) leaves no room for a "
                f"prompt within policy.max_tokens ({whole.policy.max_tokens}); raise the latter."
            )
        return found


class ExprlOutcomeStage(RlStage):
    """ExpRL-Outcome: the judge scores every trace, group-normalised advantages."""

    kind: Literal["exprl-outcome"]
    overlong: Literal["zero", "score"] = "zero"
    """Score of a trace that ran into max_new_tokens: 0 (paper), or what the judge says."""

    def violations(self, whole) -> list[str]:
        found = super().violations(whole)
        if whole.judge is None:
            found.append(f"stage {self.name} ({self.kind}) needs a judge; add the section `judge`.")
        return found


class SparseRlStage(RlStage):
    """Sparse-reward RL: right answer or not, mean-centred advantages, loose clip, no KL."""

    kind: Literal["sparse-rl"]
    loss: SparseLossConfig = SparseLossConfig()
    verifier_deadline_s: float = Field(5.0, gt=0)
    max_abstention_rate: float = Field(0.5, ge=0, le=1)


class SftStage(Stage):
    """Supervised fine-tuning on prompt and completion pairs, in the order of the file."""

    kind: Literal["sft"]
    examples: str
    """JSON lines with `prompt` and `completion`."""
    batch_size: PositiveInt = 32


AnyStage = Annotated[ExprlOutcomeStage | SparseRlStage | SftStage, Field(discriminator="kind")]
