"""The stages of a run, which follow each other; each one starts from the weights of the stage before."""

import math
from typing import Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.losses import AdvantageOrPlugin, Aggregation, LossConfig, SparseLossConfig
from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.config.problems import BuiltInDomain, Domain, ProblemsConfig, PromptConfig
from exprl_megatron.config.reward import RewardTermConfig, reward_faults
from exprl_megatron.config.segments import RouteConfig, SegmentsConfig
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.config.soft_overlong import SoftOverlongConfig

ZERO_ALONE = ("group-normalized", "mean-centered", "leave-one-out", "group-centered-batch-normalized")
"""Advantages that are differences within a group: they are 0 for a group of one trace."""


class Stage(Config):
    """Settings of every stage."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Names the stage's directories, metrics and weights. (default: its kind)"""
    steps: PositiveInt
    """Number of steps."""
    optimizer: OptimizerConfig = OptimizerConfig()


class RlStage(Stage):
    """Settings of the stages that learn from the policy's own traces."""

    problems: ProblemsConfig
    problems_per_step: PositiveInt = 32
    """Problems whose traces make one step."""
    group_size: PositiveInt = 16
    """Traces of each problem."""
    over_sampling: float = Field(1.0, ge=1)
    """Sample this many times problems_per_step problems; the groups that are finished first make the step, and the
    others are cancelled. Steps do not wait for their slowest traces, but problems with short traces are favored."""
    updates_per_step: PositiveInt = 1
    """Number of optimizer steps that share the traces of one step."""
    max_staleness: NonNegativeInt = 0
    """Number of steps by which the sampling weights may be older than the current ones; 0 is strictly on-policy. With
    n, the next n steps are sampled while a step is trained, and the weights change within traces."""
    sampling: SamplingConfig = SamplingConfig()
    loss: LossConfig = LossConfig()
    problems_from: str | None = None
    """Learn from those of `problems` alone that this earlier stage of your own kept (docs/extending.md)."""

    @property
    def is_supervised(self) -> bool:
        """Whether its updates are those of supervised fine-tuning on its traces."""
        return False

    @property
    def needs_ref_policy(self) -> bool:
        """Whether the loss needs log-probs of the reference policy (the stage's weights at its start, frozen)."""
        return self.loss.kl_coefficient > 0

    def prompts_for(self, groups: int) -> int:
        """Return the number of problems to sample for `groups` groups, with over-sampling."""
        return math.ceil(groups * self.over_sampling)

    def violations(self, run_config) -> list[str]:
        found = []
        if self.problems_per_step % self.updates_per_step:
            found.append(
                f"stage {self.name}: problems_per_step ({self.problems_per_step}) is not a multiple of "
                f"updates_per_step ({self.updates_per_step}); change one of them."
            )
        if self.sampling.max_new_tokens >= run_config.policy.max_tokens:
            found.append(
                f"stage {self.name}: sampling.max_new_tokens ({self.sampling.max_new_tokens}) leaves no room for a "
                f"prompt within policy.max_tokens ({run_config.policy.max_tokens}); raise the latter."
            )
        if self.needs_ref_policy and run_config.policy.ref_policy == "server" and self.sampling.temperature != 1:
            found.append(
                f"stage {self.name}: policy.ref_policy is server, but a server scores prompts at temperature 1 "
                f"alone and sampling.temperature is {self.sampling.temperature:g}; set ref_policy to host."
            )
        found += self._learning_violations()
        return found + (self._staleness_violations() if self.max_staleness else [])

    def _learning_violations(self) -> list[str]:
        """Return the reasons why the stage would learn from another distribution than it samples, or from advantages of
        0.
        """
        found = []
        sampling = self.sampling
        cut = [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        cut += [f"top_k {sampling.top_k}"] if sampling.top_k > 0 else []
        if cut:
            found.append(
                f"stage {self.name}: sampling has {' and '.join(cut)}, but the loss has the log-probs of the whole "
                "distribution, from which such traces are not sampled; set top_p to 1 and top_k to -1."
            )
        if self.group_size == 1 and (zero := self._zero_alone()) is not None:
            found.append(
                f"stage {self.name}: group_size is 1, but {zero} compares a trace with the others of its group, so "
                "that every advantage is 0; raise group_size, or choose another."
            )
        return found

    def _zero_alone(self) -> str | None:
        """Return the setting that makes the advantage of a group of one trace 0, if any."""
        advantage = getattr(self, "advantage", None)
        return f"advantage {advantage}" if advantage in ZERO_ALONE else None

    def _staleness_violations(self) -> list[str]:
        """Return the reasons why the stage must not learn from traces of older weights."""
        if self.loss.corrects:
            return []
        return [
            f"stage {self.name}: max_staleness is {self.max_staleness}, but nothing corrects for traces of older "
            "weights; set loss.correction.kind to truncated or masked, loss.use_rollout_log_probs to true, or "
            "max_staleness to 0."
        ]


class JudgedStage(RlStage):
    """Settings of the stages whose rewards come from the judge."""

    kind: str
    """`exprl-outcome` or `exprl-process`."""

    def violations(self, run_config) -> list[str]:
        found = super().violations(run_config)
        if run_config.judge is None:
            found.append(f"stage {self.name} ({self.kind}) needs a judge; add the section `judge`.")
        return found

    @property
    def judgements_per_trace(self) -> int:
        """Largest number of judgements of one trace."""
        return 1


class ExprlOutcomeStage(JudgedStage):
    """ExpRL-Outcome: the judge scores every trace; advantages are normalized within groups."""

    kind: Literal["exprl-outcome"]
    """The judge scores whole traces."""
    advantage: AdvantageOrPlugin = "group-normalized"
    """How a group's scores become advantages (docs/algorithms.md)."""
    overlong: Literal["zero", "score", "exclude"] = "zero"
    """Score of a trace that reached max_new_tokens: 0 (paper), the judge's score, or none (the trace is left out)."""
    variant: Literal["recommended", "code"] = "recommended"
    """`code`: an abstention is excluded from the loss, but its reward 0 is part of the group's mean and std."""
    soft_overlong: SoftOverlongConfig | None = None
    """Penalize traces close to the length limit, in addition to what `overlong` does."""
    reward: tuple[RewardTermConfig, ...] = ()
    """Terms of the reward; () is the score alone. What `overlong` does to a score it does to the term `judge`."""

    def violations(self, run_config) -> list[str]:
        found = super().violations(run_config) + reward_faults(self.name, self.reward, judged=True)
        if self.reward and self.variant == "code":
            found.append(
                f"stage {self.name}: variant is code, but the released code has no reward terms; remove reward."
            )
        if self.soft_overlong is not None:
            found += self.soft_overlong.faults(self.name, self.sampling.max_new_tokens)
            if self.variant == "code":
                found.append(
                    f"stage {self.name}: variant is code, but the released code has no soft_overlong; remove it."
                )
        return found


class ExprlProcessStage(JudgedStage):
    """ExpRL-Process: the judge scores every segment or prefix, and each segment has its own advantage."""

    kind: Literal["exprl-process"]
    """The judge scores every segment or prefix of a trace."""
    estimator: Literal["delta", "end", "group", "batch", "basic"] = "delta"
    """DeltaNorm, EndNorm, GroupNorm, BatchNorm, or the score itself."""
    granularity: Literal["prefix", "segment"] = "prefix"
    """What the judge reads: the trace up to the end of a segment (paper), or the segment alone (code)."""
    variant: Literal["recommended", "paper", "code"] = "recommended"
    """The paper's or the released code's equations, or the recommended form; see algorithms/process.py."""
    segments: SegmentsConfig = SegmentsConfig()
    overlong: Literal["zero", "penalize", "exclude"] = "zero"
    """Advantages of a trace that reached max_new_tokens: 0, minus the group's mean last score, or none (left out)."""
    allow_off_policy: bool = False
    """Permit several updates on one step's traces, and learning from traces of older weights."""
    routes: dict[Domain, RouteConfig] = Field(default_factory=dict)
    """Other granularities and estimators for some domains."""

    def violations(self, run_config) -> list[str]:
        found = super().violations(run_config)
        if self.updates_per_step > 1 and not self.allow_off_policy:
            found.append(
                f"stage {self.name}: process rewards need strictly on-policy updates, but updates_per_step is "
                f"{self.updates_per_step}; set it to 1, or allow_off_policy to true."
            )
        for domain in sorted(self.routes.keys() - {*get_args(BuiltInDomain), *self.problems.domains}):
            found.append(
                f"stage {self.name}: routes has the domain {domain!r}, which is not one of "
                f"{', '.join((*get_args(BuiltInDomain), *self.problems.domains))}; correct it, or add it to "
                "problems.domains."
            )
        if self.overlong != "zero" and self.variant != "recommended":
            found.append(
                f"stage {self.name}: overlong is {self.overlong}, but the variant {self.variant} has its own rule for "
                "overlong traces; set overlong to zero."
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
    def judgements_per_trace(self) -> int:
        """Largest number of judgements of one trace."""
        return self.segments.max_count(self.sampling.max_new_tokens)

    def route(self, domain: Domain) -> RouteConfig:
        """Return how problems of `domain` are judged."""
        return self.routes.get(domain, RouteConfig(granularity=self.granularity, estimator=self.estimator))


class SparseRlStage(RlStage):
    """Sparse-reward RL: right answer or not, advantages centered within groups, loose clip, no KL."""

    kind: Literal["sparse-rl"]
    """A verifier checks the final answer."""
    advantage: AdvantageOrPlugin = "mean-centered"
    """How a group's scores become advantages (docs/algorithms.md)."""
    loss: SparseLossConfig = SparseLossConfig()
    overlong: Literal["score", "exclude"] = "score"
    """A trace that reached max_new_tokens counts like any other, or is left out (DAPO's filtering)."""
    soft_overlong: SoftOverlongConfig | None = None
    """Penalize traces close to the length limit, in addition to what `overlong` does."""
    reward: tuple[RewardTermConfig, ...] = ()
    """Terms of the reward; () is the verifier's score alone."""
    dynamic_sampling: PositiveInt | None = None
    """Maximum number of rounds in which further problems replace zero-variance groups (DAPO); None: none is
    replaced."""
    max_abstention_rate: float = Field(0.5, ge=0, le=1)
    """A larger share of abstentions among the traces of a step stops the run."""

    @property
    def verifies(self) -> bool:
        """Whether the reward depends on the answer verifier."""
        return not self.reward or any(term.term == "verifier" for term in self.reward)

    def violations(self, run_config) -> list[str]:
        soft = [] if self.soft_overlong is None else self.soft_overlong.faults(self.name, self.sampling.max_new_tokens)
        return super().violations(run_config) + soft + reward_faults(self.name, self.reward, judged=False)

    def _staleness_violations(self) -> list[str]:
        found = super()._staleness_violations()
        if self.dynamic_sampling is not None:
            found.append(
                f"stage {self.name}: dynamic_sampling chooses a step's problems by its traces, but with max_staleness "
                f"({self.max_staleness}) the next step is sampled before these are known; leave one of them out."
            )
        return found


class SelfDistillStage(RlStage):
    """Self-distillation: the teacher is the reference policy with the reference solution in its prompt.

    A token's loss is (student - teacher log-prob, detached) * student log-prob: the score-function estimate of the
    gradient of KL(student || teacher), on the student's own traces.
    """

    kind: Literal["self-distill"]
    """The policy with the reference in its prompt teaches the policy without it."""
    teacher_prompt: PromptConfig = PromptConfig(
        user="{problem}\n\nThis is a solution to the problem:\n{reference}\n\n"
        "After understanding it, solve the problem in your own way."
    )
    """`user` shows {problem} and {reference}."""
    aggregation: Aggregation = "sequence-mean"
    """How the losses of tokens become one number (docs/algorithms.md)."""

    @property
    def needs_ref_policy(self) -> bool:
        """True: the reference policy is the teacher."""
        return True

    def violations(self, run_config) -> list[str]:
        found = super().violations(run_config)
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
    """Supervised fine-tuning on completions."""
    examples: str | None = None
    """JSON lines with `prompt` and `completion`."""
    problems: ProblemsConfig | None = None
    """Problems whose references are the completions, in a new seeded order each epoch."""
    prompt: PromptConfig | None = None
    """The prompt to learn under; None: the run's."""
    batch_size: PositiveInt = 32
    """Examples in one step."""

    def violations(self, run_config) -> list[str]:
        if (self.examples is None) == (self.problems is None):
            return [f"stage {self.name}: give either `examples` or `problems` to learn from."]
        return []
