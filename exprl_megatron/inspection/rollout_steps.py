"""The groups of a run's rollout log, of one step or of many, and of its evaluations, with their advantages."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stage_kinds import CustomStageConfig
from exprl_megatron.config.stages import ExprlOutcomeStage, ExprlProcessStage, SparseRlStage, Stage
from exprl_megatron.errors import UserError
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import DAMAGE, Journal, read_step
from exprl_megatron.runs.log_prob_files import TrainerLogProbFiles

TokenAdvantages = np.ndarray | None
"""[tokens], float32: the advantage of each token of a trace; None: the trace is out of the loss."""


@dataclass(frozen=True)
class InspectedGroup:
    """A group, where it was found, and what the step learned from it."""

    place: str
    """`STAGE, step N`, or `evaluation NAME`."""
    number: int
    """In its step, 0-based."""
    group: Group
    advantages: tuple[TokenAdvantages, ...] | None
    """One for each sample; None where nothing has advantages there."""
    trainer_log_probs: tuple[np.ndarray | None, ...] | None = None
    """Of each sample [response tokens], None where it is out of the loss; None where the run keeps none."""

    def gap(self, place: int) -> np.ndarray | None:
        """Return the trainer's minus the sampler's log-probs of a sample, float32 [response tokens]; None where the
        trainer's are unknown.
        """
        trainer = None if self.trainer_log_probs is None else self.trainer_log_probs[place]
        return None if trainer is None else trainer - self.group.samples[place].trace.log_probs


def logged_steps(
    directory: RunDirectory, config: RunConfig, stage: str | None, step: int | None, every: bool
) -> list[tuple[str, int]]:
    """Return the selected (stage, step) pairs, of one stage or of all: one step, `every` step, or else the latest one.

    Raises:
        UserError: there is none in the rollout log.
    """
    names = [each.name for each in config.stages]
    if stage is not None and stage not in names:
        raise UserError(f"{directory.root} has no stage {stage!r}; its stages are {', '.join(names)}.")
    journal = Journal(directory.journal)
    found = [(name, number) for name in names if stage in (None, name) for number in journal.steps(name)]
    if not found:
        where = "" if stage is None else f" of stage {stage}"
        raise UserError(f"The rollout log {directory.journal} has no step{where} yet; try again when one was sampled.")
    if step is not None:
        wanted = [pair for pair in found if pair[1] == step]
        if not wanted:
            raise UserError(f"The rollout log {directory.journal} has no step {step}; it has {_ranges(found)}.")
        return wanted if every else wanted[-1:]
    return found if every else found[-1:]


def logged_groups(directory: RunDirectory, config: RunConfig, stage: str, step: int) -> Iterator[InspectedGroup]:
    """Yield the groups of one step; none where the step has been deleted meanwhile (`journal.keep_steps`).

    Raises UserError where the file is damaged or of a later version.
    """
    sampled = Journal(directory.journal).read(stage, step)
    if sampled is None:
        return
    (settings,) = (each for each in config.stages if each.name == stage)
    advantages = step_advantages(settings, sampled.groups)
    of_trainer = TrainerLogProbFiles(directory.trainer_log_probs).read(stage, step)
    for number, group in enumerate(sampled.groups):
        of_group = None if advantages is None else tuple(advantages[number])
        known = None if of_trainer is None else _of_group(of_trainer, number, group)
        yield InspectedGroup(f"{stage}, step {step}", number, group, of_group, known)


def evaluation_groups(directory: RunDirectory, name: str) -> Iterator[InspectedGroup]:
    """Yield the groups of held-out answers of the evaluation `name`.

    Raises:
        UserError: they were not kept, or the file is damaged or of a later version.
    """
    path = evaluation_file(directory, name)
    try:
        groups = read_step(path).groups
    except DAMAGE as error:
        raise UserError(
            f"The answers {path} are damaged ({error}); delete the file: the evaluation's figures are in {name}.json."
        ) from error
    for number, group in enumerate(groups):
        yield InspectedGroup(f"evaluation {name}", number, group, None)


def evaluation_file(directory: RunDirectory, name: str) -> Path:
    """Return the file with the answers of the evaluation `name`.

    Raises:
        UserError: there is none; the error names the evaluations that have answers.
    """
    kept = sorted(path.relative_to(directory.evaluations) for path in directory.evaluations.rglob("*.parquet"))
    names = [str(path.with_suffix("")) for path in kept]
    if name not in names:
        kept_names = f"it has those of {', '.join(names)}" if names else "the run has kept no evaluation's answers"
        raise UserError(f"{directory.evaluations} has no answers of an evaluation {name!r}; {kept_names}.")
    return directory.evaluations / f"{name}.parquet"


def step_advantages(stage: Stage, groups: list[Group]) -> list[list[TokenAdvantages]] | None:
    """Compute advantages by the stage's own rules; None where it has none, where its own estimator is gone, or where
    the user's own code chooses what is learned.

    Raises:
        UserError: the log does not fit the stage.
    """
    if isinstance(stage, CustomStageConfig) or not isinstance(
        stage, ExprlOutcomeStage | ExprlProcessStage | SparseRlStage
    ):
        return None
    # It imports torch, which takes seconds and is needed here alone.
    from exprl_megatron.training.train_samples import token_advantages

    try:
        return token_advantages(stage, groups)
    except PluginError:
        return None  # the user's own estimator is not on this machine
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The rollout log does not fit stage {stage.name} of config.yaml ({error}); restore the run's config."
        ) from error


def span_advantage(advantages: TokenAdvantages, start: int, end: int) -> float | None:
    """Return the advantage of the span's last token: all of a span have the same, or only the last has one.

    None where the trace is out of the loss or the span is empty.
    """
    return None if advantages is None or end <= start else float(np.asarray(advantages)[end - 1])


def _of_group(log_probs: dict[tuple[int, int], np.ndarray], number: int, group: Group) -> tuple[np.ndarray | None, ...]:
    """Return the arrays of each sample. A step that was sampled again has other tokens than were learned from: none."""
    found = (log_probs.get((number, sample.trace.sample)) for sample in group.samples)
    return tuple(
        values if values is not None and len(values) == len(sample.trace.token_ids) else None
        for values, sample in zip(found, group.samples, strict=True)
    )


def _ranges(pairs: list[tuple[str, int]]) -> str:
    stages: dict[str, list[int]] = {}
    for stage, step in pairs:
        stages.setdefault(stage, []).append(step)
    return ", ".join(f"{min(steps)} to {max(steps)} of stage {stage}" for stage, steps in stages.items())
