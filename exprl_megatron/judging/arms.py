"""The three arms of a calibration: the same traces are judged with the right, no and a wrong reference."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from exprl_megatron.judging.abstentions import count_abstentions
from exprl_megatron.judging.calibration import (
    Misplacement,
    agreement,
    auroc,
    bootstrap_interval,
    histogram,
    misplacement,
    rank_correlation,
    wrong_references,
)
from exprl_megatron.judging.judgement import Granularity, Judgement, Scored
from exprl_megatron.judging.labeled_traces import LabeledTrace
from exprl_megatron.judging.verdict import HIGHEST, LOWEST
from exprl_megatron.problems.problem import Problem
from exprl_megatron.utils.intervals import Interval

Arm = Literal["right", "none", "wrong"]
"""Which reference the judge is given."""
ARMS: tuple[Arm, ...] = get_args(Arm)

GradeText = Callable[[Problem, str, Granularity], Awaitable[Judgement]]
"""The signature of Judge.grade: problem, text, and the granularity of the text."""


@dataclass(frozen=True)
class Consistency:
    """The agreement of several sampled judgements of one trace, over the traces that have at least two scores."""

    repeats: int
    """Number of judgements requested for each trace."""
    agreement: float
    """Mean over traces of the share of pairs of judgements with the same score."""
    deviation: float
    """Mean over traces of the standard deviation (n - 1) of the scores, in points of the scale 1..5."""


@dataclass(frozen=True)
class ArmMetrics:
    """Metrics of one arm; shares are in [0, 1], scores on 1..5; nan (null in JSON) where nothing can be measured."""

    arm: Arm
    traces: int
    misplaced: Misplacement
    interval: Interval | None
    """95 % bootstrap interval of the misplacement, over problems."""
    auroc: float
    abstained: dict[str, int]
    """Reason -> number of traces."""
    right_scores: tuple[int, int, int, int, int]
    """Numbers of right traces with a score of 1, 2, 3, 4, 5."""
    wrong_scores: tuple[int, int, int, int, int]
    right_length_bias: float
    """Spearman correlation of score and length in characters among right traces."""
    wrong_length_bias: float
    consistency: Consistency | None

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON types."""
        return without_nan({**asdict(self), "misplacement": self.misplaced.rate})


def arm_problems(problems: Sequence[Problem], arm: Arm) -> dict[str, Problem]:
    """Return each problem by its id, with the reference and short answer that the arm gives it.

    A wrong reference is the reference of another of `problems`, chosen by the released rule.
    """
    by_id = {problem.id: problem for problem in problems}
    if arm == "none":
        return {key: replace(problem, reference=None, answer=None) for key, problem in by_id.items()}
    if arm == "wrong":
        others = {key: by_id[other] for key, other in wrong_references(list(by_id)).items()}
        return {
            key: replace(problem, reference=others[key].reference, answer=others[key].answer)
            for key, problem in by_id.items()
        }
    return by_id


async def judge_arm(grade: GradeText, traces: Sequence[LabeledTrace], arm: Arm) -> list[Judgement]:
    """Judge whole traces under an arm; returns the judgements in the order of `traces`.

    All requests are in flight at the same time. The first exception cancels the other requests and propagates.
    """
    problems = arm_problems([trace.problem for trace in traces], arm)
    return await judge_all(grade, [(problems[trace.problem.id], trace.text, "trace") for trace in traces])


async def judge_all(grade: GradeText, requests: Sequence[tuple[Problem, str, Granularity]]) -> list[Judgement]:
    """Judge each (problem, text, granularity), and return the judgements in the same order; see judge_arm."""
    tasks = [asyncio.ensure_future(grade(*request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def arm_metrics(
    arm: Arm,
    traces: Sequence[LabeledTrace],
    judgements: Sequence[Judgement],
    repeats: Sequence[Sequence[Judgement]] = (),
) -> ArmMetrics:
    """Compute the metrics of an arm.

    Args:
        arm: which reference the judge had.
        traces: the judged traces.
        judgements: one judgement for each trace, in the same order.
        repeats: further sampled rounds of judgements of the same traces.
    """
    scores = [on_scale(judgement) for judgement in judgements]
    correct = [trace.correct for trace in traces]

    def rate(indices: np.ndarray) -> float:
        return misplacement([scores[i] for i in indices], [correct[i] for i in indices]).rate

    return ArmMetrics(
        arm=arm,
        traces=len(traces),
        misplaced=misplacement(scores, correct),
        interval=bootstrap_interval([trace.problem.id for trace in traces], rate),
        auroc=auroc(scores, correct),
        abstained=dict(count_abstentions(judgements).most_common()),
        right_scores=histogram(_side(scores, correct, True)),
        wrong_scores=histogram(_side(scores, correct, False)),
        right_length_bias=_length_bias(scores, traces, True),
        wrong_length_bias=_length_bias(scores, traces, False),
        consistency=_consistency(repeats) if repeats else None,
    )


def on_scale(judgement: Judgement) -> float | None:
    """Return the score on the scale 1..5; None where the judge abstained."""
    return LOWEST + (HIGHEST - LOWEST) * judgement.value if isinstance(judgement, Scored) else None


def _side(scores: Sequence[float | None], correct: Sequence[bool], right: bool) -> list[float]:
    return [score for score, truth in zip(scores, correct, strict=True) if score is not None and truth == right]


def _length_bias(scores: Sequence[float | None], traces: Sequence[LabeledTrace], right: bool) -> float:
    pairs = [
        (score, len(trace.text))
        for score, trace in zip(scores, traces, strict=True)
        if score is not None and trace.correct == right
    ]
    return rank_correlation([score for score, _ in pairs], [length for _, length in pairs])


def _consistency(rounds: Sequence[Sequence[Judgement]]) -> Consistency:
    of_trace = [[s for s in map(on_scale, judgements) if s is not None] for judgements in zip(*rounds, strict=True)]
    repeated = [scores for scores in of_trace if len(scores) > 1]
    if not repeated:
        return Consistency(len(rounds), math.nan, math.nan)
    return Consistency(
        repeats=len(rounds),
        agreement=float(np.mean([agreement(scores) for scores in repeated])),
        deviation=float(np.mean([np.std(scores, ddof=1) for scores in repeated])),
    )


def without_nan(value: Any) -> Any:
    """Replace nan by None in nested dicts, since JSON has no nan."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
