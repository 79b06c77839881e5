"""A run in progress: its policy, its progress and its servers, with the operations that the algorithm calls."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from exprl_megatron.algorithms.batch import LossFunction, SampleOrOutline, TrainSample
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import JudgedStage, RlStage, SelfDistillStage, SftStage, Stage
from exprl_megatron.errors import GradientNotFinite, Preempted, RunStopped
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.scatter import SampleScatter
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rollout.group import Group, StepInfo
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal, SampledStep
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training.custom_metrics import StepMetrics, custom_step_metrics, log_failures
from exprl_megatron.training.evaluator import Evaluator, evaluation_name
from exprl_megatron.training.examples import ExampleReader
from exprl_megatron.training.first_update import AssertionCounts, check_first_update
from exprl_megatron.training.log_prob_gap import check_log_prob_gap, gap_bound
from exprl_megatron.training.phase_switch import PhaseSwitch
from exprl_megatron.training.prefetch import RolloutPrefetch
from exprl_megatron.training.ref_scorer import RefScorer
from exprl_megatron.training.rollout_phase import RolloutPhase
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.training.run_saves import RunSaves
from exprl_megatron.training.skipped_updates import SkippedUpdates, nonfinite_gradient_error
from exprl_megatron.training.statistics import staleness_statistics
from exprl_megatron.training.step_record import StepRecord
from exprl_megatron.training.teacher import teacher_prompts
from exprl_megatron.training.train_samples import TokenAdvantages
from exprl_megatron.training.trainer_log_probs import TrainerLogProbs
from exprl_megatron.utils.collector import collect
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import WeightSync

T = TypeVar("T")
Batches = tuple[Sequence[SampleOrOutline], Sequence[SampleOrOutline]]
"""The samples of an update, and the samples that the reference policy scores for them."""


@dataclass(frozen=True)
class ServerLinks:
    """The components by which this rank's policy and the servers share weights and devices."""

    sync: WeightSync
    phases: PhaseSwitch
    ref_scorer: RefScorer | None
    """Scores under the reference policy, where a separate server does that."""


@dataclass(frozen=True)
class RankZero:
    """The parts of a run that exist only on rank 0; None on the other ranks."""

    rollouts: Rollouts | None = None
    prefetch: RolloutPrefetch | None = None
    evaluator: Evaluator | None = None
    logger: RunLogger | None = None


class Run:
    """The state of a run on this rank.

    Every rank calls the same methods in the same order; rank 0 drives the servers.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        policy: Policy,
        coordinator: RankCoordinator,
        servers: ServerLinks,
        rank_zero: RankZero,
        start: tuple[RunProgress, Path | None],
    ):
        """`start` is the progress so far, and the checkpoint to resume from, if any."""
        self.config = config
        self.policy = policy
        self._directory = directory
        self._coordinator = coordinator
        self._sync = servers.sync
        self._phases = servers.phases
        self._ref_scorer = servers.ref_scorer
        self._scatter = SampleScatter(policy)
        # They are used only in work for rank 0, where they exist.
        self._rollouts = cast(Rollouts, rank_zero.rollouts)
        prefetch = cast(RolloutPrefetch, rank_zero.prefetch)
        self._evaluator = cast(Evaluator, rank_zero.evaluator)
        self._logger = rank_zero.logger
        self._progress, self._resumed_from = start
        self._examples: ExampleReader | None = None
        self._teacher_prompts: dict[str, tuple[int, ...]] = {}
        self._record = StepRecord(rank_zero.logger)
        self._trained_stages: set[str] = set()
        self._assertions = AssertionCounts()
        self._step_metrics: StepMetrics | None = None
        self._trainer_log_probs = (
            TrainerLogProbs(directory.trainer_log_probs, policy.world, coordinator.is_rank0)
            if config.journal.trainer_log_probs and config.learns
            else None
        )
        self._rollout_phase = RolloutPhase(
            coordinator, servers.phases, self._rollouts, prefetch, self._record, self._assertions
        )
        self._saves = RunSaves(config, directory, policy, coordinator, self._rollouts, self._trainer_log_probs)

    def remaining_stages(self) -> Iterator[Stage]:
        """Yield the stages that are not finished, and record each one as finished afterwards."""
        while self._progress.stage < len(self.config.stages):
            yield self.config.stages[self._progress.stage]
            self._progress = self._progress.after_stage()

    def remaining_steps(self, stage: Stage) -> range:
        """Return the steps of `stage` (1-based) that are not done."""
        return range(self._progress.step + 1, stage.steps + 1)

    def open_stage(self, stage: Stage) -> None:
        """Make a new optimizer for the current weights, or load the checkpoint that the run resumes from."""
        self._phases.switch_to_training()
        needs_ref_policy = isinstance(stage, RlStage) and stage.needs_ref_policy
        updates = stage.steps * (stage.updates_per_step if isinstance(stage, RlStage) else 1)
        self.policy.begin_stage(stage.optimizer, updates, keep_ref_policy=needs_ref_policy and self._ref_scorer is None)
        if needs_ref_policy and self._ref_scorer is not None:
            self._ref_scorer.begin_stage(stage.name)
        if self._resumed_from is not None and self._progress.step > 0:
            self._saves.load_checkpoint(self._resumed_from, stage)
        self._resumed_from = None
        self._examples = ExampleReader(self.config, stage) if isinstance(stage, SftStage) else None
        if self._examples is not None and self._logger is not None and self._examples.dropped:
            self._logger.log(f"{stage.name}: {self._examples.dropped} examples are too long and left out")
        self._teacher_prompts = self._read_teacher_prompts(stage) if isinstance(stage, SelfDistillStage) else {}

    def graded_groups(self, stage: RlStage, step: int) -> list[Group]:
        """Return the step's groups on rank 0, [] elsewhere: from the rollout log, or sampled under the newest weights.

        Where the stage has `max_staleness`, some tokens may be older, and sampling of the next steps is started.
        """
        sampled = self._rollout_phase.sample(stage, step, self._progress.prompts_consumed, self.weight_version)
        groups, consumed = ([], 0) if sampled is None else (sampled.groups, sampled.prompts_consumed)
        self._record.counts = {} if sampled is None else self._counts(stage, sampled)
        if sampled is not None and self._logger is not None:
            self._logger.sampled(stage, step, groups, self._rollouts.problems.texts(stage))
        self._progress = self._coordinator.broadcast_from_rank0(lambda: self._progress.after_sampling(groups, consumed))
        return groups

    def on_rank0(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work` on rank 0, None elsewhere; an error on rank 0 ends every rank."""
        return self._coordinator.on_rank0(work)

    def custom_metrics(self, stage: RlStage, step: int, groups: list[Group]) -> dict[str, float]:
        """Compute the metrics of `step_metrics` on rank 0; a failure is reported once and stops nothing."""
        if self._step_metrics is None:
            self._step_metrics = log_failures(custom_step_metrics(self.config.step_metrics), self._logger.log)
        return self._step_metrics(StepInfo(stage.name, step), groups)

    def custom_advantages(self, stage: RlStage, step: int, groups: list[Group]) -> list[list[TokenAdvantages]]:
        """Let a stage of the user's own choose what is learned from `groups`, on rank 0; see update_samples."""
        advantages, metrics = self._rollouts.custom_stage(stage).learn(step, groups)
        self._record.counts |= metrics
        return advantages

    def scattered(self, batches: Callable[[], Sequence[Batches]]) -> list[Batches]:
        """Build `batches` on rank 0 and send each rank the samples that it learns from (see SampleScatter)."""
        made = self._coordinator.on_rank0(batches)
        shared = self._scatter.scatter(None if made is None else [batch for pair in made for batch in pair])
        return list(zip(shared[::2], shared[1::2], strict=True))

    @property
    def weight_version(self) -> str:
        """Name of the policy's current weights."""
        return self._progress.weight_version

    def sft_batch(self, stage: SftStage, step: int) -> list[TrainSample]:
        """Return the tokenized rows of step `step`."""
        return self._examples.batch(step, stage.batch_size)

    @property
    def teacher_prompts(self) -> dict[str, tuple[int, ...]]:
        """Prompt token ids of the stage's teacher by problem id: the problem and its reference solution."""
        return self._teacher_prompts

    def ref_log_probs(self, samples: Sequence[SampleOrOutline], temperature: float) -> list[np.ndarray]:
        """Compute the log-probs [response tokens], float32, of each sample under the reference policy."""
        if self._ref_scorer is not None:
            return self._ref_scorer.log_probs(samples)
        return self.policy.log_probs(samples, temperature, ref_policy=True)

    def recorded(self, objective: LossFunction) -> LossFunction:
        """Wrap `objective` so that it records the trainer's log-probs, where the config requests that."""
        return objective if self._trainer_log_probs is None else self._trainer_log_probs.recorded(objective)

    def apply_update(self, gradient_scale: float = 1.0) -> dict[str, float]:
        """Take an optimizer step on the accumulated gradients times `gradient_scale`; returns its metrics.

        Raises:
            RunStopped: a gradient is not finite. A resumed run that gets the same gradient skips the update.
        """
        self._record.updates += 1
        try:
            update = self.policy.apply_update(gradient_scale)
        except GradientNotFinite as error:
            self._stop_unless_known(error)
            return {"grad_norm": math.nan, "update_skipped": 1.0}
        self._progress = replace(self._progress, updates=self._progress.updates + 1)
        return {"grad_norm": update.grad_norm, "learning_rate": update.learning_rate}

    def check_update(self, stage: RlStage, metrics: dict[str, float]) -> None:
        """Check an update before it is taken.

        Raises:
            RunStopped: the log-probs of trainer and sampler differ too much, or an assertion fails.
        """
        first = self._progress.first_gap
        try:
            check_log_prob_gap(metrics, gap_bound(self.config, first))
        except RunStopped:
            # The log-probs show which tokens differ.
            self._write_trainer_log_probs(*self._record.place)
            raise
        self._progress = replace(self._progress, first_gap=metrics.get("sampler_gap/mean") if first is None else first)
        replays, first_in_step = bool(self.config.policy.router_replay), not self._record.updates
        if self.config.debug.assertions and first_in_step:
            check_first_update(stage.name, self._progress.step + 1, metrics, replays)
        self._assertions.updated(self._progress.step + 1, metrics, first_in_step, replays)

    @contextmanager
    def step(self, stage: Stage, step: int) -> Iterator[dict[str, float]]:
        """Measure one step; at its end, print its line and write its metrics."""
        self._record.begin(stage.name, step)
        metrics: dict[str, float] = {}
        yield metrics
        if isinstance(stage, RlStage):
            self._write_trainer_log_probs(stage.name, step, wait=False)
        collect()
        self._trained_stages.add(stage.name)
        self._progress = replace(self._progress, step=step)
        metrics |= self._phases.take_memory_stats() | self._record.finish()
        if self._logger is not None:
            metrics |= self._rollouts.take_metrics(stage.name, step)
            self._logger.step_done(stage, step, metrics)

    def clock(self, name: str) -> AbstractContextManager[None]:
        """Add the seconds spent inside to the step's metric `seconds/NAME`, and record a span of the timeline."""
        return self._record.clock(name)

    def checkpoint_if_due(self, stage: Stage, step: int) -> None:
        """Write a checkpoint every `checkpoint.every_steps` steps, after the last step, and when asked to stop.

        A run that makes no updates has no checkpoints: a resumed one reads its steps from the rollout log.

        Raises:
            Preempted: the run was asked to stop.
        """
        checkpoint, asked_to_stop = self.config.checkpoint, self._coordinator.asked_to_stop()
        due = asked_to_stop or step % checkpoint.every_steps == 0 or step == stage.steps
        if due and self.config.learns:
            with self.clock("save"):
                self._saves.save_checkpoint(stage, self._progress)
            if self._coordinator.is_rank0 and isinstance(stage, RlStage):
                self._saves.prune_logs(stage, step)
        if asked_to_stop:
            raise Preempted(
                f"The run was asked to stop and did so after step {step} of {stage.name}"
                f"{', with a checkpoint' if self.config.learns else ''}; continue with --resume."
            )

    def close_stage(self, stage: Stage) -> None:
        """Save the stage's weights in Hugging Face format, once, if the run learns: copies would look like results."""
        if not self.config.learns:
            return
        self._saves.save_stage(stage, learned=stage.name in self._trained_stages)

    def evaluate(self, stage: Stage | None = None, step: int | None = None) -> None:
        """Measure pass@k of the current weights on the held-out problems, unless that was done.

        It is called before the first stage (None), after all steps of `stage`, and after `step` of them; it does
        nothing where no evaluation is due.

        Raises:
            Preempted: the run was asked to stop; a resumed run repeats the evaluation.
        """
        if not self.config.has_evaluation or not (step is None or self.config.required_evaluation.is_due(step)):
            return
        if stage is not None and not self.config.learns:
            # The weights have not changed.
            return
        name = evaluation_name(stage, step)
        if not self._coordinator.broadcast_from_rank0(lambda: self._evaluator.done(name)):
            self._rollout_phase.evaluate(self._evaluator, name, self.weight_version)
        self._coordinator.on_rank0(lambda: self._evaluator.log(stage, step))

    def close_logs(self, deadline_s: float) -> None:
        """Close logs and trackers of a run that ended early, within about `deadline_s` seconds."""
        if self._logger is not None:
            self._logger.close(deadline_s)

    def close(self) -> None:
        """Print the closing table, disconnect from the servers, end the verifier's processes and close the logs."""
        if self._coordinator.is_rank0:
            self._logger.closing(self._evaluator.all(), self._assertions)
        self._sync.close()
        if self._ref_scorer is not None:
            self._ref_scorer.close()
        if self._coordinator.is_rank0:
            self._coordinator.run(self._rollouts.close())
            self._logger.close()
        self._coordinator.close()

    def _stop_unless_known(self, error: GradientNotFinite) -> None:
        """Raise RunStopped, unless an earlier attempt of the run had the same gradient that is not finite."""
        stage, step = self._record.place
        skipped = SkippedUpdates(self._directory.skipped_updates)
        if self._coordinator.broadcast_from_rank0(lambda: skipped.add(stage, step, self._record.updates)):
            self._coordinator.on_rank0(lambda: self._logger.log(f"{error} again; step {step} of {stage} is skipped"))
            return
        journal = Journal(RunDirectory(self.config.debug.rollouts or self._directory.root).journal)
        traces = journal.path(stage, step) if self._examples is None else None
        raise nonfinite_gradient_error(error, stage, step, traces)

    def _write_trainer_log_probs(self, stage: str, step: int, wait: bool = True) -> None:
        if self._trainer_log_probs is not None:
            self._trainer_log_probs.write(stage, step)
            if wait:
                self._trainer_log_probs.wait()

    def _read_teacher_prompts(self, stage: SelfDistillStage) -> dict[str, tuple[int, ...]]:
        tokenizer = load_tokenizer(self.config.policy.model)
        room = self.config.policy.max_tokens - stage.sampling.max_new_tokens
        return teacher_prompts(tokenizer, stage.teacher_prompt, load_problems(stage.problems), room)

    def _counts(self, stage: RlStage, sampled: SampledStep) -> dict[str, float]:
        judged = isinstance(stage, JudgedStage)
        counts = {f"judge/{name}": float(count) for name, count in sampled.judge_counts.items()} if judged else {}
        return counts | (staleness_statistics(sampled.groups, self._progress.updates) if stage.max_staleness else {})
