"""The three arms of a calibration: the same traces judged with the right reference, with none and with a wrong one."""

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
from exprl_megatron.judging.judged_traces import JudgedTrace
from exprl_megatron.judging.judgement import Granularity, Judgement, Scored
from exprl_megatron.judging.verdict import HIGHEST, LOWEST
from exprl_megatron.problems.problem import Problem
from exprl_megatron.utils.intervals import Interval

Arm = Literal["right", "none", "wrong"]
"""Which reference the judge is given."""
ARMS: tuple[Arm, ...] = get_args(Arm)

GradeText = Callable[[Problem, str, Granularity], Awaitable[Judgement]]
"""Judge.grade: the problem (without a reference: None), the text, and what of a trace the text is."""


@dataclass(frozen=True)
class Consistency:
    """How far several sampled judgements of one trace agree, over the traces that have at least two scores."""

    repeats: int
    """Judgements asked for, of each trace."""
    agreement: float
    """Mean share of pairs of judgements of a trace that have the same score."""
    deviation: float
    """Mean standard deviation (n - 1) of a trace's scores, in points of the scale 1..5."""


@dataclass(frozen=True)
class ArmFigures:
    """What one arm shows; shares in [0, 1], scores on 1..5, nan (in JSON null) where nothing was to be measured."""

    arm: Arm
    traces: int
    misplaced: Misplacement
    interval: Interval | None
    """Of the misplacement, 95 %, bootstrap over problems."""
    auroc: float
    abstained: dict[str, int]
    """Reason -> traces."""
    right_scores: tuple[int, int, int, int, int]
    """Right traces with a score of 1, 2, 3, 4, 5."""
    wrong_scores: tuple[int, int, int, int, int]
    right_length_bias: float
    """Spearman correlation of score and length in characters among right traces."""
    wrong_length_bias: float
    consistency: Consistency | None

    def record(self) -> dict[str, Any]:
        """The same in JSON's terms."""
        return without_nan({**asdict(self), "misplacement": self.misplaced.rate})


def arm_problems(problems: Sequence[Problem], arm: Arm) -> dict[str, Problem]:
    """By id: each problem with the reference that the arm gives it.

    The short answer goes with its reference. A wrong one is that of another of `problems`, by the released rule.
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


async def judge_arm(grade: GradeText, traces: Sequence[JudgedTrace], arm: Arm) -> list[Judgement]:
    """The judgements of whole traces under an arm, in their order; all requests are in flight at once.

    The first failure cancels everything else and is raised as it is.
    """
    problems = arm_problems([trace.problem for trace in traces], arm)
    return await judge_all(grade, [(problems[trace.problem.id], trace.text, "trace") for trace in traces])


async def judge_all(grade: GradeText, requests: Sequence[tuple[Problem, str, Granularity]]) -> list[Judgement]:
    """The judgements on (problem, text, unit), in their order; see judge_arm."""
    tasks = [asyncio.ensure_future(grade(*request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def arm_figures(
    arm: Arm,
    traces: Sequence[JudgedTrace],
    judgements: Sequence[Judgement],
    repeats: Sequence[Sequence[Judgement]] = (),
) -> ArmFigures:
    """What the judgements on `traces`, in their order, show; `repeats` holds further sampled rounds of judgements."""
    scores = [on_scale(judgement) for judgement in judgements]
    correct = [trace.correct for trace in traces]

    def rate(indices: np.ndarray) -> float:
        return misplacement([scores[i] for i in indices], [correct[i] for i in indices]).rate

    return ArmFigures(
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
    """The score on the scale 1..5; None where the judge abstained."""
    return LOWEST + (HIGHEST - LOWEST) * judgement.value if isinstance(judgement, Scored) else None


def _side(scores: Sequence[float | None], correct: Sequence[bool], right: bool) -> list[float]:
    return [score for score, truth in zip(scores, correct, strict=True) if score is not None and truth == right]


def _length_bias(scores: Sequence[float | None], traces: Sequence[JudgedTrace], right: bool) -> float:
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
    """JSON has no nan: null instead, in dicts however deep."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
