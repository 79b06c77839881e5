"""Measures how a process judge's scores fall at the first wrong step of a trace."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exprl_megatron.judging.arms import GradeText, judge_all, on_scale, without_nan
from exprl_megatron.judging.calibration import SCORE_TOLERANCE, auroc, bootstrap_interval
from exprl_megatron.judging.champ import MarkedTrace
from exprl_megatron.judging.judgement import Abstained, Granularity, Judgement
from exprl_megatron.problems.problem import Problem
from exprl_megatron.utils.intervals import Interval

GRANULARITIES: tuple[Granularity, ...] = ("prefix", "segment")


@dataclass(frozen=True)
class WrongStepMetrics:
    """Metrics of a judge's scores (1..5) at the first wrong step; nan (null in JSON) where nothing was scored.

    An AUROC is the probability that a right text scores higher than one with the wrong step; ties count half.
    """

    granularity: Granularity
    traces: int
    marked: int
    mean_before: float
    """Mean score right before the marked step."""
    mean_after: float
    """Mean score with the marked step."""
    mean_unmarked: float
    """Mean score of whole traces without a wrong step (of their last step)."""
    auroc: float
    """Over all texts; those before marks and the unmarked traces are right."""
    interval: Interval | None
    """95 % bootstrap interval of the AUROC, over problems."""
    paired_auroc: float
    """Before against after within the same trace, so that the difficulty of problems cancels out."""
    falls: int
    """Traces whose score is lower with the marked step than before it."""
    equals: int
    """Traces whose score is the same."""
    rises: int
    abstained: int
    judgements: int

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON types."""
        return without_nan(asdict(self))


async def judge_wrong_steps(
    grade: GradeText, traces: Sequence[MarkedTrace], granularity: Granularity
) -> WrongStepMetrics:
    """Judge every trace before and after its mark, and compute the metrics."""
    before = await _judged(
        grade, granularity, [(trace.problem, trace.text_before_error(granularity)) for trace in traces]
    )
    after = await _judged(grade, granularity, [(trace.problem, trace.text_with_error(granularity)) for trace in traces])
    return wrong_step_metrics(granularity, traces, before, after)


async def _judged(
    grade: GradeText, granularity: Granularity, texts: Sequence[tuple[Problem, str | None]]
) -> list[Judgement | None]:
    """Return the judgements in the order of `texts`; None where there is no text."""
    given = [(problem, text, granularity) for problem, text in texts if text is not None]
    judgements = iter(await judge_all(grade, given))
    return [None if text is None else next(judgements) for _, text in texts]


def wrong_step_metrics(
    granularity: Granularity,
    traces: Sequence[MarkedTrace],
    before: Sequence[Judgement | None],
    after: Sequence[Judgement | None],
) -> WrongStepMetrics:
    """Compute the metrics from the judgements before and after each trace's mark (None: there was no text)."""
    marked = [trace.error_span is not None for trace in traces]
    low = [None if judgement is None else on_scale(judgement) for judgement in after]
    high = [None if judgement is None else on_scale(judgement) for judgement in before]
    problems = [trace.problem.id for trace in traces]
    scores, right = [*high, *low], [True] * len(high) + [False] * len(low)

    def resampled(indices: np.ndarray) -> float:
        return auroc([scores[i] for i in indices], [right[i] for i in indices])

    pairs = [(b, a) for b, a in zip(high, low, strict=True) if b is not None and a is not None]
    falls = sum(a < b - SCORE_TOLERANCE for b, a in pairs)
    equals = sum(abs(b - a) <= SCORE_TOLERANCE for b, a in pairs)
    given = [judgement for judgement in (*before, *after) if judgement is not None]
    return WrongStepMetrics(
        granularity=granularity,
        traces=len(traces),
        marked=sum(marked),
        mean_before=_mean([s for s, m in zip(high, marked, strict=True) if m]),
        mean_after=_mean(low),
        mean_unmarked=_mean([s for s, m in zip(high, marked, strict=True) if not m]),
        auroc=auroc(scores, right),
        interval=bootstrap_interval(problems + problems, resampled),
        paired_auroc=(falls + equals / 2) / len(pairs) if pairs else float("nan"),
        falls=falls,
        equals=equals,
        rises=len(pairs) - falls - equals,
        abstained=sum(isinstance(judgement, Abstained) for judgement in given),
        judgements=len(given),
    )


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else float("nan")
