"""A run in progress: its policy, its place, its servers; the verbs that the algorithm is written in."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import AutoTokenizer

from exprl_megatron.algorithms.batch import LearnedFrom, Sequence
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import RlStage, SelfDistillStage, SftStage, Stage
from exprl_megatron.errors import GradientNotFinite, Preempted
from exprl_megatron.policy.checkpoint import load_checkpoint, save_checkpoint
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.scatter import SequenceScatter
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.reporting.timeline import ROLLOUTS, STEP
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal, SampledStep
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training.ahead import Ahead
from exprl_megatron.training.assertions import check_first_update
from exprl_megatron.training.console import Console
from exprl_megatron.training.evaluator import Evaluator, evaluation_name
from exprl_megatron.training.examples import ExampleReader
from exprl_megatron.training.log_prob_gap import check_log_prob_gap, gap_bound
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.skipped_updates import SkippedUpdates, not_learned
from exprl_megatron.training.start_scorer import StartScorer
from exprl_megatron.training.statistics import staleness_statistics
from exprl_megatron.training.teacher import teacher_prompts
from exprl_megatron.training.turns import Turns
from exprl_megatron.weight_sync.conductor import Conductor
from exprl_megatron.weight_sync.sync import WeightSync

T = TypeVar("T")
Batches = tuple[list[LearnedFrom], list[LearnedFrom]]
"""The sequences of an update, and the same as the stage's starting policy reads them."""


class Run:
    """Every rank has one and calls the same methods in the same order; rank 0 conducts.

    `rollouts`, `ahead`, `evaluator` and `console` exist on rank 0 alone; `resumed_from` is the checkpoint to go on
    from, if any; `start_scorer`, where the config wants one, scores under the starting weights of the stages that need
    them.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        policy: Policy,
        conductor: Conductor,
        sync: WeightSync,
        turns: Turns,
        rollouts: Rollouts | None,
        ahead: Ahead | None,
        evaluator: Evaluator | None,
        console: Console | None,
        place: RunProgress,
        resumed_from: Path | None,
        start_scorer: StartScorer | None,
    ):
        self.config = config
        self.policy = policy
        self._directory = directory
        self._conductor = conductor
        self._sync = sync
        self._turns = turns
        self._scatter = SequenceScatter(policy)
        self._rollouts = rollouts
        self._ahead = ahead
        self._evaluator = evaluator
        self._console = console
        self._place = place
        self._resumed_from = resumed_from
        self._start_scorer = start_scorer
        self._examples: ExampleReader | None = None
        self._teacher_prompts: dict[str, tuple[int, ...]] = {}
        self._seconds: dict[str, float] = {}
        self._counted: dict[str, float] = {}
        self._sync_metrics: dict[str, float] = {}
        self._updates_in_step = 0
        self._now = ("", 0)
        self._trained: set[str] = set()

    def remaining_stages(self) -> Iterator[Stage]:
        """The stages from the run's place on."""
        while self._place.stage < len(self.config.stages):
            yield self.config.stages[self._place.stage]
            self._place = self._place.after_stage()

    def remaining_steps(self, stage: Stage) -> range:
        """The steps of `stage` (1-based) that are not done yet."""
        return range(self._place.step + 1, stage.steps + 1)

    def open_stage(self, stage: Stage) -> None:
        """A fresh optimizer on the current weights, or the state of the checkpoint that the run resumes from."""
        self._turns.learn()
        needs_start = isinstance(stage, RlStage) and stage.needs_start
        updates = stage.steps * (stage.updates_per_step if isinstance(stage, RlStage) else 1)
        self.policy.begin_stage(stage.optimizer, updates, keep_start=needs_start and self._start_scorer is None)
        if needs_start and self._start_scorer is not None:
            self._start_scorer.begin_stage(stage.name)
        if self._resumed_from is not None and self._place.step > 0:
            load_checkpoint(self._resumed_from, self.policy)
        self._resumed_from = None
        self._examples = ExampleReader(self.config, stage) if isinstance(stage, SftStage) else None
        if self._examples is not None and self._console is not None and self._examples.dropped:
            self._console.say(f"{stage.name}: {self._examples.dropped} examples are too long and left out")
        self._teacher_prompts = self._read_teacher_prompts(stage) if isinstance(stage, SelfDistillStage) else {}

    def graded_groups(self, stage: RlStage, step: int) -> list[Group]:
        """The step's groups on rank 0, none elsewhere: from the journal, or sampled under the newest weights.

        Where the stage samples ahead, some of their tokens are older, and the next steps are begun.
        """
        version, drawn = self.weight_version, self._place.problems_drawn
        if self._conductor.everywhere(lambda: self._ahead.announce(stage, step, version)):
            with self.clock("sync"):
                self._sync_metrics = self._turns.bring(version)
        with self.clock(ROLLOUTS):
            work = self._conductor.here_alone(lambda: self._ahead.begin(stage, step, drawn, version))
            while (waiting := self._waiting_for(work)) != "done":
                if waiting == "weights":
                    self._sync_metrics = self._turns.bring(version)
            sampled = self._conductor.here_alone(lambda: self._ahead.take(stage, step))
            self._conductor.everywhere(lambda: self._conductor.run(self._rollouts.check_served()))
        self._turns.learn()
        self._counted = {} if sampled is None else self._counts(stage, sampled)
        self._place = self._conductor.everywhere(lambda: self._place_after(sampled))
        return [] if sampled is None else sampled.groups

    def on_rank0(self, work: Callable[[], T]) -> T | None:
        """The result of `work` on rank 0, None elsewhere; an error there is raised on every rank."""
        return self._conductor.here_alone(work)

    def scattered(self, batches: Callable[[], list[Batches]]) -> list[Batches]:
        """What rank 0 makes of `batches`; elsewhere only what this rank learns from is whole (see SequenceScatter)."""
        made = self._conductor.here_alone(batches)
        shared = self._scatter.scatter(None if made is None else [batch for pair in made for batch in pair])
        return list(zip(shared[::2], shared[1::2], strict=True))

    @property
    def weight_version(self) -> str:
        """Name of the policy's current weights."""
        return self._place.weight_version

    def sft_batch(self, stage: SftStage, step: int) -> list[Sequence]:
        """The rows of step `step`, tokenised."""
        return self._examples.batch(step, stage.batch_size)

    @property
    def teacher_prompts(self) -> dict[str, tuple[int, ...]]:
        """What the stage's frozen teacher reads of each problem: its text and its reference."""
        return self._teacher_prompts

    def start_log_probs(self, sequences: list[LearnedFrom], temperature: float) -> list[np.ndarray]:
        """Of every response token under the stage's starting weights."""
        if self._start_scorer is not None:
            return self._start_scorer.log_probs(sequences)
        return self.policy.log_probs(sequences, temperature, start=True)

    def apply_update(self, gradient_scale: float = 1.0) -> dict[str, float]:
        """Take the optimizer step for the accumulated gradients times `gradient_scale`; its metrics.

        Raises RunStopped where they are not finite; of a run that comes there again the step is left out.
        """
        self._updates_in_step += 1
        try:
            update = self.policy.apply_update(gradient_scale)
        except GradientNotFinite as error:
            self._stop_unless_known(error)
            return {"grad_norm": math.nan, "update_skipped": 1.0}
        self._place = replace(self._place, updates=self._place.updates + 1)
        return {"grad_norm": update.grad_norm, "learning_rate": update.learning_rate}

    def check_update(self, stage: RlStage, metrics: dict[str, float]) -> None:
        """Stop the run before an update where trainer and sampler disagree, or an assertion does not hold."""
        first = self._place.first_gap
        check_log_prob_gap(metrics, gap_bound(self.config, first))
        self._place = replace(self._place, first_gap=metrics.get("sampler_gap/mean") if first is None else first)
        if self.config.debug.assertions and not self._updates_in_step:
            check_first_update(stage.name, self._place.step + 1, metrics)

    @contextmanager
    def step(self, stage: Stage, step: int) -> Iterator[dict[str, float]]:
        """Everything around one step: its clock, its line on the terminal, its metrics on disk."""
        started, at = time.monotonic(), time.time()
        self._seconds, self._counted, self._sync_metrics = {}, {}, {}
        self._now = (stage.name, step)
        self._updates_in_step = 0
        metrics: dict[str, float] = {}
        yield metrics
        self._trained.add(stage.name)
        self._place = replace(self._place, step=step)
        metrics |= self._counted | self._sync_metrics | self._turns.take_ledger()
        metrics |= {f"seconds/{name}": value for name, value in self._seconds.items()}
        metrics["seconds/step"] = time.monotonic() - started
        self._keep_span(STEP, at)
        if self._console is not None:
            metrics["loop/lag_max_s"] = self._rollouts.loop_lag.take()
            self._console.step_done(stage, step, metrics)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the step's `seconds/NAME`, and keep when they were."""
        started, at = time.monotonic(), time.time()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started
        self._keep_span(name, at)

    def checkpoint_if_due(self, stage: Stage, step: int) -> None:
        """Write a checkpoint every so many steps, after a stage's last one, and where the run is asked to stop.

        Raises Preempted after the latter.
        """
        checkpoint, asked_to_stop = self.config.checkpoint, self._conductor.asked_to_stop()
        if asked_to_stop or step % checkpoint.every_steps == 0 or step == stage.steps:
            with self.clock("save"):
                save_checkpoint(self._directory.checkpoints, self.policy, self._place.as_record(), keep=checkpoint.keep)
            if self._conductor.here and isinstance(stage, RlStage):
                self._rollouts.forget(stage, step)
        if asked_to_stop:
            raise Preempted(
                f"The run was asked to stop and did so after step {step} of {stage.name}, with a checkpoint; "
                "go on with --resume."
            )

    def close_stage(self, stage: Stage) -> None:
        """Leave the stage's weights in Hugging Face form, once."""
        target = self._directory.models / stage.name
        if stage.name not in self._trained and self._conductor.everywhere(target.is_dir):
            return
        # A run that went back behind the end of the stage, from a damaged checkpoint, has a model of it already.
        former = target.with_name(target.name + ".former")
        self._conductor.here_alone(lambda: _rename(target, former))
        self.policy.save_huggingface(target)
        self._conductor.here_alone(lambda: shutil.rmtree(former, ignore_errors=True))

    def evaluate(self, stage: Stage | None = None, step: int | None = None) -> None:
        """pass@k of the current weights on the held-out problems, once.

        Before the first stage (None), after all steps of `stage`, or after `step` of them where an evaluation is due
        then. Raises Preempted where the run is asked to stop meanwhile; a resumed run makes the evaluation again.
        """
        if not self.config.evaluates or not (step is None or self.config.evaluation.is_due(step)):
            return
        name = evaluation_name(stage, step)
        if not self._conductor.everywhere(lambda: self._evaluator.done(name)):
            self._measure(name)
        self._conductor.here_alone(lambda: self._evaluator.log(stage, step))

    def _measure(self, name: str) -> None:
        """Evaluate the current weights as `name`; steps that are sampled ahead go on under these weights meanwhile."""
        version = self.weight_version
        self._conductor.everywhere(lambda: self._ahead.pause(version))
        self._turns.bring(version)
        self._conductor.everywhere(lambda: self._ahead.resume())
        work = self._conductor.here_alone(lambda: self._conductor.start(self._evaluator.evaluate(name, version)))
        while (waiting := self._waiting_for(work)) != "done":
            if waiting == "weights":
                self._turns.bring(version)
            elif self._conductor.asked_to_stop():
                self._conductor.here_alone(lambda: work.cancel())
                raise Preempted(
                    f"The run was asked to stop and did so in the evaluation of {name}; "
                    "continue with --resume, which makes it again."
                )
        self._conductor.everywhere(lambda: work.result())
        self._turns.learn()

    def close(self) -> None:
        """Print the closing table, leave the servers, end the verifier's processes, finish the logs."""
        if self._conductor.here:
            self._console.closing(self._evaluator.all())
        self._sync.close()
        if self._start_scorer is not None:
            self._start_scorer.close()
        if self._conductor.here:
            self._conductor.run(self._rollouts.close())
            self._console.close()
        self._conductor.close()

    def _stop_unless_known(self, error: GradientNotFinite) -> None:
        """Raise RunStopped where the run meets a gradient that is not finite for the first time."""
        stage, step = self._now
        skipped = SkippedUpdates(self._directory.skipped_updates)
        if self._conductor.everywhere(lambda: skipped.add(stage, step, self._updates_in_step)):
            self._conductor.here_alone(lambda: self._console.say(f"{error} again; step {step} of {stage} is left out"))
            return
        journal = Journal(RunDirectory(self.config.debug.rollouts or self._directory.root).journal)
        raise not_learned(error, stage, step, journal.path(stage, step) if self._examples is None else None)

    def _waiting_for(self, work: Future | None) -> str:
        """What rank 0's `work` with the sampling servers waits for, on every rank; see Fleet.attend.

        The ranks hear from each other meanwhile, however long it takes.
        """
        return self._conductor.everywhere(
            lambda: "done" if work is None else self._conductor.run(self._rollouts.attend(work))
        )

    def _keep_span(self, name: str, start: float) -> None:
        if self._console is not None:
            self._console.span(*self._now, name, start)

    def _read_teacher_prompts(self, stage: SelfDistillStage) -> dict[str, tuple[int, ...]]:
        tokenizer = AutoTokenizer.from_pretrained(self.config.policy.model)
        room = self.config.policy.max_tokens - stage.sampling.max_new_tokens
        return teacher_prompts(tokenizer, stage.teacher_prompt, load_problems(stage.problems), room)

    def _counts(self, stage: RlStage, sampled: SampledStep) -> dict[str, float]:
        counts = {f"judge/{name}": float(count) for name, count in sampled.judge_counts.items()}
        return counts | (staleness_statistics(sampled.groups, self._place.updates) if stage.max_staleness else {})

    def _place_after(self, sampled: SampledStep) -> RunProgress:
        members = [member for group in sampled.groups for member in group.members]
        return replace(
            self._place,
            problems_drawn=self._place.problems_drawn + sampled.problems_drawn,
            traces=self._place.traces + len(members),
            tokens=self._place.tokens + sum(len(member.trace.token_ids) for member in members),
            abstentions=self._place.abstentions + sum(member.score is None for member in members),
        )


def _rename(directory: Path, name: Path) -> None:
    """Where there is such a directory; what has the name already is deleted."""
    if directory.is_dir():
        shutil.rmtree(name, ignore_errors=True)
        directory.rename(name)
