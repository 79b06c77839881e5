"""The whole configuration of a run."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.debug import DebugConfig
from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.placement import COLOCATED_MEM_FRACTION, PlacementConfig
from exprl_megatron.config.plugin_path import PluginPath
from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.config.problems import BuiltInDomain, LeakGuardConfig, ProblemsConfig, PromptConfig
from exprl_megatron.config.reproduction import deviations, released_only_values
from exprl_megatron.config.serving import RETURN_ROUTED_EXPERTS, SamplingConfig, ServerConfig, SyncConfig
from exprl_megatron.config.stage_kinds import AnyStage, CustomStageConfig
from exprl_megatron.config.stages import JudgedStage, RlStage
from exprl_megatron.config.tracking import TrackerName, TrackingConfig
from exprl_megatron.config.verifying import VerifierConfig


class EvaluationConfig(Config):
    """pass@k on held-out problems before the first stage, after every stage and, with `every_steps`, within stages."""

    problems: ProblemsConfig
    every_steps: PositiveInt | None = None
    """Evaluate every this many steps of each stage too (verl's `test_freq`, slime's `--eval-interval`, TRL's
    `eval_steps`)."""
    samples: PositiveInt = 16
    """Traces of each problem."""
    k: tuple[PositiveInt, ...] = (1, 16)
    """Which pass@k are reported; none may exceed `samples`."""
    sampling: SamplingConfig = SamplingConfig()
    confidence: float = Field(0.95, gt=0, lt=1)
    """Coverage of the interval of each pass@k."""

    def is_due(self, step: int) -> bool:
        """Return whether the weights are evaluated after step `step` of a stage, which is not its last one."""
        return self.every_steps is not None and step > 0 and step % self.every_steps == 0

    def violations(self, run_config) -> list[str]:
        return [
            f"evaluation.k contains {k}, more than evaluation.samples ({self.samples}); raise samples."
            for k in self.k
            if k > self.samples
        ]


class CheckpointConfig(Config):
    """When checkpoints are written, and how many are kept."""

    every_steps: PositiveInt = 10
    """Steps of a stage between two checkpoints; each stage's last step has one too."""
    keep: PositiveInt = 2
    """Number of checkpoints that are kept, the latest ones."""


class JournalConfig(Config):
    """The rollout log."""

    keep_steps: PositiveInt | None = None
    """Keep this many steps of each stage before a checkpoint, and all steps after it; None: every step."""
    trainer_log_probs: bool = False
    """Also write the trainer's log-prob of each sampled token before the update (docs/rollouts.md), as slime's
    `--save-debug-train-data` does."""

    def violations(self, run_config) -> list[str]:
        needed = run_config.checkpoint.every_steps * run_config.checkpoint.keep
        if self.keep_steps is None or self.keep_steps >= needed:
            return []
        return [
            f"journal.keep_steps is {self.keep_steps}, but to resume from the oldest of its checkpoints a run may need "
            f"{needed} steps (checkpoint.every_steps x checkpoint.keep); raise it."
        ]


class RunConfig(Config):
    """A run: a policy, its servers, and a list of stages."""

    directory: str
    """Directory of everything that the run writes."""
    permissions: Literal["private", "shared"] = "private"
    """Who else may read it: nobody (directories 0700, files 0600), or the users that the umask permits. The files
    contain references and judge prompts. The key of the run's servers is private in any case."""
    seed: NonNegativeInt = 0
    """What all randomness of the run comes from: order of the problems, samples, initial weights."""
    reproduce: Literal["released"] | None = None
    """`released`: do what the released ExpRL code does, where the config says nothing else (docs/reproducing.md)."""
    policy: PolicyConfig
    plugin_path: tuple[str, ...] = ()
    """Directories in which modules of your own are searched, after the working directory and before the Python path
    (docs/extending.md)."""
    prompt: PromptConfig = PromptConfig()
    leak_guard: LeakGuardConfig = LeakGuardConfig()
    server: ServerConfig = ServerConfig()
    placement: PlacementConfig = PlacementConfig()
    judge: JudgeConfig | None = None
    verifier: VerifierConfig = VerifierConfig()
    step_metrics: tuple[PluginPath, ...] = ()
    """Functions of your own (step, groups) -> {name: number}, whose metrics each step has as `custom/NAME`
    (docs/extending.md)."""
    sync: SyncConfig = SyncConfig()
    stages: tuple[AnyStage, ...]
    """The stages in their order; `kind` selects what a stage does: a built-in kind, or a class of your own."""
    evaluation: EvaluationConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    journal: JournalConfig = JournalConfig()
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go besides `metrics.jsonl`; each needs the extra of its name."""
    tracking: TrackingConfig = TrackingConfig()
    debug: DebugConfig = DebugConfig()

    def with_precision(self, cuda: bool | None = None) -> Self:
        """Return the config with `policy.precision: auto` replaced; see PrecisionConfig.resolved."""
        precision = self.policy.precision.resolved(cuda)
        return self.model_copy(update={"policy": self.policy.model_copy(update={"precision": precision})})

    @property
    def required_judge(self) -> JudgeConfig:
        """The section `judge` of a run that needs it (see `needs_judge`).

        Raises:
            ValueError: there is none.
        """
        if self.judge is None:
            raise ValueError("the config has no judge; see needs_judge")
        return self.judge

    @property
    def required_evaluation(self) -> EvaluationConfig:
        """The section `evaluation` of a run with `has_evaluation`.

        Raises:
            ValueError: there is none.
        """
        if self.evaluation is None:
            raise ValueError("the config has no evaluation; see has_evaluation")
        return self.evaluation

    @property
    def deviations(self) -> list[str]:
        """One sentence for each value that differs from the released program, although `reproduce` is set."""
        return deviations(self.model_dump(mode="json"))

    @property
    def needs_sampling_servers(self) -> bool:
        """Whether the run needs sampling servers."""
        return self.debug.only != "learning" and (
            self.evaluation is not None or any(isinstance(s, RlStage) for s in self.stages)
        )

    @property
    def learns(self) -> bool:
        """Whether any weight changes; if not, there are no checkpoints and models, and one evaluation suffices."""
        return self.debug.only != "sampling"

    @property
    def has_evaluation(self) -> bool:
        """Whether held-out problems are evaluated."""
        return self.needs_sampling_servers and self.evaluation is not None

    @property
    def needs_judge(self) -> bool:
        """Whether any stage needs the judge."""
        return self.needs_sampling_servers and any(isinstance(stage, JudgedStage) for stage in self.stages)

    @property
    def has_ref_server(self) -> bool:
        """Whether a separate server scores the log-probs of the reference policy."""
        return self.policy.ref_policy == "server" and any(
            isinstance(stage, RlStage) and stage.needs_ref_policy for stage in self.stages
        )

    @property
    def sampling_server(self) -> ServerConfig:
        """The config that sampling servers start with: those that share GPUs with the trainer leave memory for it, and
        with `policy.router_replay` they return the experts that they choose."""
        changes: dict[str, Any] = {}
        if self.policy.router_replay:
            changes["extra_args"] = (*self.server.extra_args, RETURN_ROUTED_EXPERTS)
        if self.placement.kind == "colocated" and self.server.memory_share is None:
            changes["mem_fraction_static"] = COLOCATED_MEM_FRACTION
        return self.server.model_copy(update=changes)

    @property
    def ref_server(self) -> ServerConfig:
        """The config of the reference policy's server: like the sampling servers', on the port after theirs."""
        port = self.server.port
        return self.server.model_copy(update={"count": 1, "port": None if port is None else port + self.server.count})

    def problem_sets(self) -> dict[ProblemsConfig, SamplingConfig]:
        """Return every set of problems of the run with the sampling that leaves the least room for its prompts."""
        uses = [(stage.problems, stage.sampling) for stage in self.stages if isinstance(stage, RlStage)]
        if self.evaluation is not None and self.has_evaluation:
            uses.append((self.evaluation.problems, self.evaluation.sampling))
        return dict(sorted(uses, key=lambda use: use[1].max_new_tokens))

    @property
    def compares_log_probs(self) -> bool:
        """Whether every update is preceded by a comparison of the trainer's log-probs with the sampler's.

        `auto` compares only log-probs that weights and cache of one version gave on both sides.
        """
        if self.sync.max_log_prob_gap != "auto":
            return self.sync.max_log_prob_gap is not None
        mixed_cache = self._samples_ahead and self.sync.pause_mode == "in_place"
        return self.debug.only != "learning" and not mixed_cache

    @property
    def _samples_ahead(self) -> bool:
        return any(isinstance(stage, RlStage) and stage.max_staleness for stage in self.stages)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that problems of this run may have: the built-in ones, and the user's own."""
        return (*get_args(BuiltInDomain), *self.custom_domains)

    @property
    def custom_domains(self) -> tuple[str, ...]:
        """The domains that the `problems` sections of this run name besides the built-in ones."""
        held_out = [] if self.evaluation is None else [self.evaluation.problems]
        return tuple(sorted({domain for problems in (*self.problem_sets(), *held_out) for domain in problems.domains}))

    def violations(self, run_config=None) -> list[str]:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        found = [f"stages: the name {name} is given twice; names must differ." for name in twice]
        if not names:
            found.append("stages is empty; list at least one stage.")
        found += self._kept_violations()
        if self.evaluation is not None and "start" in names:
            found.append("stages: the name start is that of the evaluation before the first stage; choose another.")
        found += [
            f"verifier.domains has the domain {domain!r}, which is not one of {', '.join(self.domains)}; correct it, "
            "or add it to problems.domains."
            for domain in sorted(self.verifier.domains.keys() - {*self.domains})
        ]
        if len(set(self.trackers)) < len(self.trackers):
            found.append("trackers has a name twice; list each tracker once.")
        found += released_only_values(self.model_dump(mode="json"))
        if self.policy.initialize == "random" and self.needs_sampling_servers:
            found.append("`policy.initialize` is random, but servers need weights to start with; train by SFT first.")
        if (
            self._samples_ahead
            and self.sync.pause_mode == "in_place"
            and self.sync.max_log_prob_gap not in ("auto", None)
        ):
            found.append(
                "sync.pause_mode is in_place, by which traces continue with the cache of older weights, but "
                "sync.max_log_prob_gap needs log-probs of the newest; set it to auto or null, or pause_mode to retract."
            )
        return found

    def _kept_violations(self) -> list[str]:
        """Return the reasons why no stage could have kept problems for another one."""
        found, earlier = [], set[str]()
        for stage in self.stages:
            wanted = stage.problems_from if isinstance(stage, RlStage) else None
            if wanted is not None and wanted not in earlier:
                found.append(
                    f"stage {stage.name}: problems_from is {wanted!r}, but the stages of your own before it are "
                    f"{', '.join(sorted(earlier)) or 'none'}; name one of them, or remove it."
                )
            elif wanted is not None and not self.learns:
                found.append(
                    f"stage {stage.name}: problems_from is {wanted!r}, but debug.only is sampling, where no stage "
                    "keeps problems; remove one of them."
                )
            if isinstance(stage, CustomStageConfig):
                earlier.add(stage.name)
        return found
