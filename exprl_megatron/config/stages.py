"""What a run does, one stage after the other; each starts from the weights that the one before left."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.losses import Advantage, Aggregation, LossConfig, SparseLossConfig
from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.config.problems import Domain, ProblemsConfig, PromptConfig
from exprl_megatron.config.segments import RouteConfig, SegmentsConfig
from exprl_megatron.config.serving import SamplingConfig

ZERO_ALONE = ("group-normalised", "mean-centred", "leave-one-out", "group-centred-batch-normalised")
"""Advantages that are differences within a group."""


class SoftOverlongConfig(Config):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): traces lose score before they are cut off."""

    max_length: PositiveInt | None = None
    """L_max, at and above which the punishment is whole; None: sampling.max_new_tokens."""
    cache: PositiveInt | None = None
    """L_cache: so many tokens below max_length the punishment begins, and grows in a line (verl's overlong_buffer.len).
    None: a fifth of max_length, as the paper has 4,096 of 20,480."""
    penalty: float = Field(0.5, gt=0)
    """The whole punishment, in units of scores, which are 0 to 1. The paper's is 1 where right answers have 1 and wrong
    ones -1: half of the distance between them."""

    def lengths(self, max_new_tokens: int) -> tuple[int, int]:
        """(L_max, L_cache) where traces have at most so many tokens."""
        longest = self.max_length or max_new_tokens
        return longest, self.cache or max(1, longest // 5)

    def faults(self, stage: str, max_new_tokens: int) -> list[str]:
        """What does not go with the stage's sampling."""
        longest, cache = self.lengths(max_new_tokens)
        found = []
        if longest > max_new_tokens:
            found.append(
                f"stage {stage}: soft_overlong.max_length is {longest}, but no trace has more than "
                f"sampling.max_new_tokens ({max_new_tokens}), so that none would be punished in full; lower it."
            )
        if cache > longest:
            found.append(
                f"stage {stage}: soft_overlong.cache is {cache}, more than the {longest} tokens of the longest trace "
                "that is not punished in full (soft_overlong.max_length, or sampling.max_new_tokens); lower it."
            )
        return found


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
    over_sampling: float = Field(1.0, ge=1)
    """So many times problems_per_step problems are drawn; the groups that are finished first make the step, and the
    others are abandoned. No step waits for its slowest traces then, but problems with short traces are favoured."""
    updates_per_step: PositiveInt = 1
    """Optimizer steps that one step's traces are split into."""
    max_staleness: NonNegativeInt = 0
    """How many steps' weights sampling may be behind those that learn from it; 0 is strictly on-policy. With n, the
    next n steps are sampled while a step learns, and the weights change under way."""
    sampling: SamplingConfig = SamplingConfig()
    loss: LossConfig = LossConfig()

    @property
    def needs_start(self) -> bool:
        """Whether the loss compares with the stage's starting policy."""
        return self.loss.kl_coefficient > 0

    def drawn_for(self, groups: int) -> int:
        """How many problems are drawn where so many groups are wanted."""
        return math.ceil(groups * self.over_sampling)

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
        if self.needs_start and whole.policy.starting_policy == "server" and self.sampling.temperature != 1:
            found.append(
                f"stage {self.name}: policy.starting_policy is server, but a server scores prompts at temperature 1 "
                f"alone and sampling.temperature is {self.sampling.temperature:g}; set starting_policy to host."
            )
        found += self._learning_violations()
        return found + (self._staleness_violations() if self.max_staleness else [])

    def _learning_violations(self) -> list[str]:
        """What would have the stage learn from another policy than was sampled, or from nothing."""
        found = []
        sampling = self.sampling
        cut = [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        cut += [f"top_k {sampling.top_k}"] if sampling.top_k > 0 else []
        if cut:
            found.append(
                f"stage {self.name}: sampling has {' and '.join(cut)}, but what is learned are log-probs of the whole "
                "distribution, of which such traces are no samples; set top_p to 1 and top_k to -1."
            )
        if self.group_size == 1 and (zero := self._zero_alone()) is not None:
            found.append(
                f"stage {self.name}: group_size is 1, but {zero} compares a trace with the others of its group, so "
                "that every advantage is 0; raise group_size, or choose another."
            )
        return found

    def _zero_alone(self) -> str | None:
        """The setting by which a trace that is alone in its group has advantage 0; None where there is none."""
        advantage = getattr(self, "advantage", None)
        return f"advantage {advantage}" if advantage in ZERO_ALONE else None

    def _staleness_violations(self) -> list[str]:
        """What stands against traces of older weights."""
        if self.loss.corrects:
            return []
        return [
            f"stage {self.name}: max_staleness is {self.max_staleness}, but nothing corrects for traces of older "
            "weights; set loss.correction.kind to truncated or masked, loss.use_rollout_log_probs to true, or "
            "max_staleness to 0."
        ]


class JudgedStage(RlStage):
    """What the stages share whose rewards come from the judge."""

    def violations(self, whole) -> list[str]:
        found = super().violations(whole)
        if whole.judge is None:
            found.append(f"stage {self.name} ({self.kind}) needs a judge; add the section `judge`.")
        return found

    @property
    def units_per_trace(self) -> int:
        """How often one trace is judged, at most."""
        return 1


class ExprlOutcomeStage(JudgedStage):
    """ExpRL-Outcome: the judge scores every trace, group-normalised advantages."""

    kind: Literal["exprl-outcome"]
    advantage: Advantage = "group-normalised"
    overlong: Literal["zero", "score", "exclude"] = "zero"
    """Score of a trace that ran into max_new_tokens: 0 (paper), what the judge says, or left out."""
    variant: Literal["recommended", "code"] = "recommended"
    """`code`: an abstention is out of the loss, but its reward 0 stays in the group's mean and std."""
    soft_overlong: SoftOverlongConfig | None = None
    """Punish traces that come near to the length limit, on top of what `overlong` makes of their scores."""

    def violations(self, whole) -> list[str]:
        found = super().violations(whole)
        if self.soft_overlong is not None:
            found += self.soft_overlong.faults(self.name, self.sampling.max_new_tokens)
            if self.variant == "code":
                found.append(
                    f"stage {self.name}: variant is code, but the released code has no soft_overlong; remove it."
                )
        return found


class ExprlProcessStage(JudgedStage):
    """ExpRL-Process: the judge scores every segment or prefix, and each segment gets an advantage of its own."""

    kind: Literal["exprl-process"]
    estimator: Literal["delta", "end", "group", "batch", "basic"] = "delta"
    """DeltaNorm, EndNorm, GroupNorm, BatchNorm, or the score itself."""
    unit: Literal["prefix", "segment"] = "prefix"
    """What the judge is shown: all up to the end of a segment (paper), or the segment alone (code)."""
    variant: Literal["recommended", "paper", "code"] = "recommended"
    """Where paper and released code differ, and where both can be bettered; see algorithms/process.py."""
    segments: SegmentsConfig = SegmentsConfig()
    overlong: Literal["zero", "penalise", "exclude"] = "zero"
    """Advantages of a trace that ran into max_new_tokens: 0, minus the group's mean last score, or left out."""
    allow_off_policy: bool = False
    """Take several updates on one step's traces, or learn from those of older weights, all the same."""
    routes: dict[Domain, RouteConfig] = Field(default_factory=dict)
    """Other units and estimators for some domains."""

    def violations(self, whole) -> list[str]:
        found = super().violations(whole)
        if self.updates_per_step > 1 and not self.allow_off_policy:
            found.append(
                f"stage {self.name}: process rewards need strictly on-policy updates, but updates_per_step is "
                f"{self.updates_per_step}; set it to 1, or allow_off_policy to true."
            )
        if self.overlong != "zero" and self.variant != "recommended":
            found.append(
                f"stage {self.name}: overlong is {self.overlong}, but the variant {self.variant} says itself what "
                "becomes of overlong traces; set overlong to zero."
            )
        return found

    def _staleness_violations(self) -> list[str]:
        found = super()._staleness_violations()
        if not self.allow_off_policy:
            found.append(
                f"stage {self.name}: process rewards need strictly on-policy traces, but max_staleness is "
                f"{self.max_staleness}; set it to 0, or allow_off_policy to true."
            )
        return found

    @property
    def units_per_trace(self) -> int:
        """How often one trace is judged, at most."""
        return self.segments.max_segments or self.sampling.max_new_tokens

    def route(self, domain: Domain) -> RouteConfig:
        """How problems of `domain` are judged."""
        return self.routes.get(domain, RouteConfig(unit=self.unit, estimator=self.estimator))


class SparseRlStage(RlStage):
    """Sparse-reward RL: right answer or not, mean-centred advantages, loose clip, no KL."""

    kind: Literal["sparse-rl"]
    advantage: Advantage = "mean-centred"
    loss: SparseLossConfig = SparseLossConfig()
    overlong: Literal["score", "exclude"] = "score"
    """A trace that ran into max_new_tokens counts like any other, or is left out (DAPO's filtering)."""
    soft_overlong: SoftOverlongConfig | None = None
    """Punish traces that come near to the length limit, on top of what `overlong` makes of their scores."""
    dynamic_sampling: PositiveInt | None = None
    """At most so many rounds of further problems replace groups whose scores are all equal (DAPO); None: kept."""
    max_abstention_rate: float = Field(0.5, ge=0, le=1)

    def violations(self, whole) -> list[str]:
        soft = [] if self.soft_overlong is None else self.soft_overlong.faults(self.name, self.sampling.max_new_tokens)
        return super().violations(whole) + soft

    def _staleness_violations(self) -> list[str]:
        found = super()._staleness_violations()
        if self.dynamic_sampling is not None:
            found.append(
                f"stage {self.name}: dynamic_sampling chooses a step's problems by its traces, but with max_staleness "
                f"({self.max_staleness}) the next step is sampled before these are known; leave one of them out."
            )
        return found


class SelfDistillStage(RlStage):
    """Self-distillation: the teacher is the frozen start of the stage, which sees the reference in its prompt.

    A token's loss is (student - teacher log-prob, detached) * student log-prob: the score-function estimate of the
    gradient of KL(student || teacher), on the student's own traces.
    """

    kind: Literal["self-distill"]
    teacher_prompt: PromptConfig = PromptConfig(
        user="{problem}\n\nThis is a solution to the problem:\n{reference}\n\n"
        "After understanding it, solve the problem in your own way."
    )
    """`user` shows {problem} and {reference}."""
    aggregation: Aggregation = "sequence-mean"

    @property
    def needs_start(self) -> bool:
        """Whether the loss compares with the stage's starting policy: the teacher."""
        return True

    def violations(self, whole) -> list[str]:
        found = super().violations(whole)
        if "{reference}" not in self.teacher_prompt.user:
            found.append(
                f"stage {self.name}: teacher_prompt.user never shows the reference; put {{reference}} into it."
            )
        if self.updates_per_step > 1:
            found.append(f"stage {self.name}: self-distillation has no ratio to correct by; set updates_per_step to 1.")
        return found

    def _staleness_violations(self) -> list[str]:
        return [f"stage {self.name}: self-distillation has no ratio to correct by; set max_staleness to 0."]


class SftStage(Stage):
    """Supervised fine-tuning on prompt and completion pairs, in the order of the file, or on problems' references."""

    kind: Literal["sft"]
    examples: str | None = None
    """JSON lines with `prompt` and `completion`."""
    problems: ProblemsConfig | None = None
    """Problems whose references are the completions, in a new seeded order each epoch."""
    prompt: PromptConfig | None = None
    """The prompt to learn under; None: the run's."""
    batch_size: PositiveInt = 32

    def violations(self, whole) -> list[str]:
        if (self.examples is None) == (self.problems is None):
            return [f"stage {self.name}: give either `examples` or `problems` to learn from."]
        return []


AnyStage = Annotated[
    ExprlOutcomeStage | ExprlProcessStage | SparseRlStage | SelfDistillStage | SftStage, Field(discriminator="kind")
]
