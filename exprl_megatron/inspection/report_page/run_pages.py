"""A run as a page shows it: figures of the whole, figures of the judge for each step, and blocks of traces."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import EvaluationConfig
from exprl_megatron.config.stages import RlStage, Stage
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.report_page.judge_figures import judge_figures
from exprl_megatron.inspection.report_page.judge_words import JudgeWords
from exprl_megatron.inspection.report_page.page_blocks import PageBlock, evenly_spaced, pack
from exprl_megatron.inspection.report_page.run_figures import (
    curves,
    evaluation_names,
    predictions,
    run_to_dict,
    time_spent,
)
from exprl_megatron.inspection.report_page.trace_records import TraceRecords
from exprl_megatron.inspection.rollout_steps import (
    InspectedGroup,
    evaluation_file,
    evaluation_groups,
    logged_groups,
    logged_steps,
)
from exprl_megatron.inspection.trace_text import PolicyTokenizer
from exprl_megatron.plugins.loading import use_plugin_path
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.sources import is_custom_source, load_problems
from exprl_megatron.reporting.plain_text import escaped
from exprl_megatron.runs.directory import RunDirectory, read_config
from exprl_megatron.runs.journal import Journal
from exprl_megatron.runs.log_prob_files import TrainerLogProbFiles

MOST_STEPS = 50
"""Of a run whose traces are read; more are sampled evenly."""


@dataclass(frozen=True)
class StepKey:
    """A step of the rollout log, or an evaluation."""

    stage: str
    """Of an evaluation its name."""
    step: int | None
    """None: an evaluation."""


@dataclass(frozen=True)
class _Read:
    stamp: tuple[int, ...]
    """Of the files that were read: sizes and times of their last changes."""
    figures: dict[str, Any]
    block: PageBlock


class RunPages:
    """Reads one run; what was read once is read again only where its file has changed.

    Raises UserError where there is no run.
    """

    def __init__(self, root: Path, name: str, references: bool):
        self.name = name
        self.directory = RunDirectory(root)
        self.config = read_config(self.directory)
        use_plugin_path(self.config.plugin_path)
        self._references = references
        self._tokenizer = PolicyTokenizer(self.config.policy.model)
        self._read: dict[StepKey, _Read] = {}
        self._loaded: dict[ProblemsConfig, dict[str, Problem]] = {}

    def figures(self) -> dict[str, Any]:
        """Return {name, directory, record, curves, time, stages} of the whole run."""
        return {
            "name": self.name,
            "directory": escaped(str(self.directory.root)),
            "record": run_to_dict(self.directory, None if self._references else self.config.leak_guard.canary or ""),
            "curves": curves(self.directory),
            "time": time_spent(self.directory),
            "stages": [{"name": stage.name, "kind": stage.kind} for stage in self.config.stages],
        }

    def predictions(self) -> dict[str, Any]:
        """Return the planner's seconds beside the run's."""
        return predictions(self.config, self.directory)

    def places(self) -> tuple[list[StepKey], int]:
        """Return the steps and evaluations whose traces are shown, in the order of the run, and how many steps there
        are.
        """
        try:
            pairs = logged_steps(self.directory, self.config, None, None, every=True)
        except UserError:
            pairs = []
        steps = [StepKey(stage, step) for stage, step in evenly_spaced(pairs, MOST_STEPS)]
        evaluations = [StepKey(name, None) for name in self._evaluations()]
        return steps + evenly_spaced(evaluations, MOST_STEPS), len(pairs)

    def read(self, places: Sequence[StepKey], most: Callable[[], int]) -> Iterator[tuple[dict[str, Any], PageBlock]]:
        """Yield, for each place, {stage, step, judge} with its index of traces, and the block.

        `most` says, before each, how many bytes of the page its block may take. A file that cannot be read is named in
        `fault` in place of the rest.
        """
        with JudgeWords(self.directory.root) as words:
            for place in places:
                what = {"stage": escaped(place.stage), "step": place.step}
                try:
                    read = self._place(place, words, most())
                except UserError as error:
                    yield what | {"fault": escaped(str(error))}, PageBlock({}, "")
                    continue
                yield what | read.block.index | {"judge": read.figures}, read.block

    def _evaluations(self) -> list[str]:
        return evaluation_names(self.directory, [stage.name for stage in self.config.stages])

    def _place(self, place: StepKey, words: JudgeWords, most: int) -> _Read:
        stamp = self._stamp(place)
        known = self._read.get(place)
        if known is not None and known.stamp == stamp:
            return known
        if place.step is None:
            groups = list(evaluation_groups(self.directory, place.stage))
        else:
            groups = list(logged_groups(self.directory, self.config, place.stage, place.step))
        problems, limit = self._settings(place)
        records = TraceRecords(self._tokenizer, self._problems(problems), words.asked, self._references)
        most_tokens = _most_tokens(groups, limit)
        figures = judge_figures(groups, most_tokens) | {"most_tokens": most_tokens}
        self._read[place] = _Read(stamp, figures, pack(groups, records, most))
        return self._read[place]

    def _settings(self, place: StepKey) -> tuple[ProblemsConfig | None, int]:
        """Return the source of the problems and the limit of a response's tokens; None where config.yaml lacks it."""
        if place.step is None:
            settings: EvaluationConfig | Stage | None = self.config.evaluation
        else:
            settings = next(stage for stage in self.config.stages if stage.name == place.stage)
        if isinstance(settings, EvaluationConfig | RlStage):
            return settings.problems, settings.sampling.max_new_tokens
        return None, 1

    def _stamp(self, place: StepKey) -> tuple[int, ...]:
        if place.step is None:
            paths = [evaluation_file(self.directory, place.stage)]
        else:
            of_trainer = TrainerLogProbFiles(self.directory.trainer_log_probs)
            paths = [
                Journal(self.directory.journal).path(place.stage, place.step),
                of_trainer.directory(place.stage, place.step),
            ]
        found = [path.stat() for path in paths if path.exists()]
        return tuple(value for each in found for value in (each.st_size, each.st_mtime_ns))

    def _problems(self, source: ProblemsConfig | None) -> dict[str, Problem]:
        """Return the problems by id; none where their file is gone. Files on a hub are not fetched."""
        if source is None:
            return {}
        if source not in self._loaded:
            self._loaded[source] = {}
            if Path(source.source).expanduser().exists() or is_custom_source(source.source):
                self._loaded[source] = {problem.id: problem for problem in _problems_of(source)}
        return self._loaded[source]


def _problems_of(source: ProblemsConfig) -> list[Problem]:
    try:
        return load_problems(source)
    except UserError:
        return []


def _most_tokens(groups: Sequence[InspectedGroup], limit: int) -> int:
    """Return the upper end of a histogram of lengths: the limit, or the longest trace where it was raised meanwhile."""
    return max([limit, *(len(m.trace.token_ids) for each in groups for m in each.group.samples)])
