"""`exprl judgement` with conditions: what the judge said in the steps of a run, from its rollout log."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from exprl_megatron.config.stages import JudgedStage
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.rollout_steps import logged_steps
from exprl_megatron.inspection.rollout_tables import HASH_DIGITS, score_text, versions_text
from exprl_megatron.judging.judgement import Judgement, Scored, judgement_to_dict
from exprl_megatron.reporting.plain_text import escaped_line
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.runs.directory import RunDirectory, read_config
from exprl_megatron.runs.journal import Journal

_ROUNDING = 5e-4
"""Scores are printed with three digits and can be given so."""


@dataclass(frozen=True)
class JudgementFilter:
    """Conditions on the listed judgements; None: no such condition."""

    stage: str | None = None
    step: int | None = None
    problem: str | None = None
    score: tuple[float, float] | None = None
    """Lowest and highest."""
    abstained: bool = False


@dataclass(frozen=True)
class LoggedJudgement:
    """A judgement and where in the run it was given."""

    stage: str
    step: int
    problem_id: str
    sample: GradedTrace
    segment: int | None
    """Number of the judged segment; None: the whole trace."""
    judgement: Judgement


def score_range(text: str) -> tuple[float, float]:
    """Return the lowest and highest score of `0.5` or `0.25:0.75`.

    Raises:
        UserError: `text` is neither, or no score is between its bounds.
    """
    try:
        first, _, second = text.partition(":")
        low, high = float(first), float(second or first)
    except ValueError as error:
        raise UserError(f"--score is {text!r}; give a score such as 0.5, or a range such as 0.25:0.75.") from error
    if not low <= high:
        raise UserError(f"--score is {text!r}, which contains no score; give the lower bound first, as in 0.25:0.75.")
    return low - _ROUNDING, high + _ROUNDING


def list_judgements(run: Path, conditions: JudgementFilter, limit: int, as_json: bool) -> None:
    """Print the judgements that meet the conditions, those of the latest steps first.

    Raises:
        UserError: the run has no such step, or no judgement is as asked for.
    """
    directory = RunDirectory(run)
    config = read_config(directory)
    judged = {stage.name for stage in config.stages if isinstance(stage, JudgedStage)}
    steps = logged_steps(directory, config, conditions.stage, conditions.step, every=True)
    journal, found = Journal(directory.journal), []
    for stage, step in reversed(steps):
        if stage in judged:
            found += [each for each in _of_step(journal, stage, step) if _fits(each, conditions)]
        if len(found) >= limit:
            break
    if not found:
        raise UserError(f"No judgement in {directory.journal} meets all conditions; drop one of them.")
    if as_json:
        print(json.dumps({"judgements": [_record(each) for each in found[:limit]]}, indent=2))
        return
    table = Table(
        "hash", "stage", "step", "weights", "problem", "sample", "verdict", caption=f"the latest, at most {limit}"
    )
    for each in found[:limit]:
        table.add_row(*(escaped_line(cell) for cell in _cells(each)))
    Console(highlight=False).print(table)


def scored_by(run: Path, key: str, limit: int) -> list[dict]:
    """Return where in the rollout log of `run` the judgement of the hash `key` is: the `limit` latest places.

    Each is {stage, step, weight_versions, problem_id, sample, segment}. Several traces may have the same text.
    """
    directory = RunDirectory(run)
    config = read_config(directory)
    journal, found = Journal(directory.journal), []
    for stage in reversed([stage for stage in config.stages if isinstance(stage, JudgedStage)]):
        for step in reversed(journal.steps(stage.name)):
            found += [_place(each) for each in _of_step(journal, stage.name, step) if each.judgement.hash == key]
            if len(found) >= limit:
                return found[:limit]
    return found


def _of_step(journal: Journal, stage: str, step: int) -> Iterator[LoggedJudgement]:
    sampled = journal.read(stage, step)
    for group in [] if sampled is None else sampled.groups:
        for sample in group.samples:
            units = enumerate(sample.judgements) if sample.segments else [(None, sample.judgement)]
            for segment, judgement in units:
                yield LoggedJudgement(stage, step, group.problem_id, sample, segment, judgement)


def _fits(each: LoggedJudgement, conditions: JudgementFilter) -> bool:
    judgement = each.judgement
    if conditions.problem not in (None, each.problem_id) or (conditions.abstained and isinstance(judgement, Scored)):
        return False
    if conditions.score is None:
        return True
    low, high = conditions.score
    return isinstance(judgement, Scored) and low <= judgement.value <= high


def _cells(each: LoggedJudgement) -> list[str]:
    sample = str(each.sample.trace.sample) + ("" if each.segment is None else f".{each.segment}")
    hash_shown = (each.judgement.hash or "")[:HASH_DIGITS]
    place = [each.stage, str(each.step), versions_text(each.sample.trace), each.problem_id, sample]
    return [hash_shown, *place, score_text(each.judgement)]


def _record(each: LoggedJudgement) -> dict:
    return _place(each) | {"judgement": judgement_to_dict(each.judgement)}


def _place(each: LoggedJudgement) -> dict:
    return {
        "stage": each.stage,
        "step": each.step,
        "weight_versions": [list(span) for span in each.sample.trace.weight_versions],
        "problem_id": each.problem_id,
        "sample": each.sample.trace.sample,
        "segment": each.segment,
    }
