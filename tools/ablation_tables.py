"""Results of a study of several arms and seeds: pooled pass@k, paired differences, tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from exprl_megatron.evaluation.pass_at_k import GradedCounts, pass_at_k
from exprl_megatron.utils.intervals import DIFFERENCE_METHOD, METHOD, difference_bounds, mean_bounds

STAGES = {"primed": "stage 1", "final": "stage 2"}
"""Which evaluation of a run -> the stage that it follows."""
SUCCESSES = "groups with a success"
_NO_SUCCESS = "verifier/all_wrong_groups"
SEGMENTS = "segments/mean"
SINGLE = "segments/single_share"


@dataclass(frozen=True)
class Evaluated:
    """One finished run: evaluations after both stages, and the records of its steps ({stage, step, metrics})."""

    arm: str
    seed: int
    primed: GradedCounts
    final: GradedCounts
    steps: list[dict]

    def curve(self, stage: str, metric: str) -> list[float]:
        """Return the metric at each step of `stage` that has it; SUCCESSES is 1 less the share of all-wrong groups."""
        if metric == SUCCESSES:
            return [1 - value for value in self.curve(stage, _NO_SUCCESS)]
        return [s["metrics"][metric] for s in self.steps if s["stage"] == stage and metric in s["metrics"]]


@dataclass(frozen=True)
class Arm:
    """All runs of one arm."""

    name: str
    runs: list[Evaluated]

    def counts(self, which: str) -> list[GradedCounts]:
        """Return the evaluation `which` (of STAGES) of each run."""
        return [getattr(run, which) for run in self.runs]

    def curve(self, stage: str, metric: str) -> np.ndarray:
        """[seeds, steps]; empty where the arm has no such stage or metric."""
        found = [run.curve(stage, metric) for run in self.runs]
        shortest = min(map(len, found))
        return np.array([values[:shortest] for values in found])


@dataclass(frozen=True)
class Pooled:
    """A mean over seeds and problems, as a share in [0, 1], with its interval."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]
    """The mean of each seed."""


def pooled_pass_at_k(counts: Sequence[GradedCounts], k: int, confidence: float = 0.95) -> Pooled:
    """pass@k over the problems of one evaluation for each seed.

    The interval (`intervals.mean_bounds`) covers the choice of problems and the luck of a run; with one seed, the
    choice of problems alone. Raises ValueError where seeds were evaluated on different problems.
    """
    values = _values(counts, _problems(counts), k)
    low, high = mean_bounds(values, confidence)
    return Pooled(float(values.mean()), float(low), float(high), tuple(map(float, values.mean(axis=1))))


@dataclass(frozen=True)
class Difference:
    """A mean of one arm less that of another, in [-1, 1], with its interval."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, int]
    """How many each side has."""


def paired_difference(
    first: Sequence[GradedCounts], second: Sequence[GradedCounts], k: int, confidence: float = 0.95
) -> Difference:
    """pass@k of `first` less that of `second`, paired by problem; one evaluation for each seed of either.

    The interval is `intervals.difference_bounds`. Raises ValueError where any two were evaluated on different problems.
    """
    problems = _problems([*first, *second])
    values = _values(first, problems, k), _values(second, problems, k)
    low, high = difference_bounds(*values, confidence)
    mean = float(values[0].mean() - values[1].mean())
    return Difference(mean, float(low), float(high), (len(first), len(second)))


def _problems(counts: Sequence[GradedCounts]) -> list[str]:
    problems = sorted(counts[0])
    if any(sorted(of_seed) != problems for of_seed in counts):
        raise ValueError("the seeds were evaluated on different problems, which cannot be pooled or paired")
    return problems


def _values(counts: Sequence[GradedCounts], problems: Sequence[str], k: int) -> np.ndarray:
    """pass@k, float64 [seeds, problems]."""
    return np.array([[pass_at_k(*of_seed[problem], k) for problem in problems] for of_seed in counts])


def results(arms: Sequence[Arm], ablations: Sequence[str], ks: Sequence[int] = (1, 16)) -> dict:
    """Return everything in JSON's terms.

    arms: name -> {seeds, primed: {pass@k}, final: {pass@k}, curves of both stages}; differences: one for each pair of
    compared arms, stage and k; method: of both kinds of interval.
    """
    of_arm = {
        arm.name: {
            "seeds": [run.seed for run in arm.runs],
            **{which: {f"pass@{k}": vars(pooled_pass_at_k(arm.counts(which), k)) for k in ks} for which in STAGES},
            "curves": {
                stage: {metric: arm.curve(stage, metric).tolist() for metric in (SUCCESSES, SEGMENTS, SINGLE)}
                for stage in ("prime", "sparse")
            },
        }
        for arm in arms
    }
    differences = [
        {"arm": arm.name, "against": other.name, "stage": which, "k": k}
        | vars(paired_difference(arm.counts(which), other.counts(which), k))
        for compared in _split(arms, ablations)
        for other, arm in combinations(compared, 2)
        for which in STAGES
        for k in ks
    ]
    method = {"mean": METHOD, "difference": DIFFERENCE_METHOD, "confidence": 0.95}
    return {"arms": of_arm, "differences": differences, "method": method}


def tables(arms: Sequence[Arm], ablations: Sequence[str]) -> str:
    """Return the rivals, the ablations, and the differences between the arms of each of the two, as Markdown."""
    rivals, others = _split(arms, ablations)
    parts = [
        f"Figures are percentages; brackets contain the 95 % interval ({METHOD}, over seeds and problems, with t for "
        "the seeds). The column seeds is the number of seeds of a row; with 1, the intervals cover only the choice of "
        "problems. Groups with a success are the share of groups of 16 traces, over all steps of stage 1, in which at "
        "least one final answer was correct.",
        _table(rivals, _RIVAL_COLUMNS),
        "Differences are in percentage points, paired by problem; brackets contain the 95 % interval "
        f"({DIFFERENCE_METHOD}, with Satterthwaite's degrees of freedom; Newcombe's if both arms are at 0 or 100). The "
        "intervals are not corrected for the number of comparisons.",
        _differences(rivals),
        "The ablations, with the arms that they are compared with (segments a trace, and percent of the traces with "
        "one segment, are those of the last step of stage 1):",
        _table(others, _ABLATION_COLUMNS),
        _differences(others),
        "The picture shows pass@1 of these tables after both stages:\n\n"
        "![pass@1 of every arm with its interval](study/pass.svg)",
        "The curves show the share of groups with a success by the verifier over the steps of both stages, in a panel "
        "for each arm. A thin line is a seed, the thick line is the mean of the seeds, and the dashed line marks the "
        "start of stage 2:",
        f"![Curves of both stages](study/curves.svg)\n\nFinished runs: {sum(len(arm.runs) for arm in arms)}.",
    ]
    return "\n\n".join(part for part in parts if part)


def _split(arms: Sequence[Arm], ablations: Sequence[str]) -> tuple[list[Arm], list[Arm]]:
    """Return the rivals; the ablations with the arms that they are compared with."""
    rivals = [arm for arm in arms if arm.name not in ablations]
    return rivals, [arm for arm in arms if arm.name in ablations or arm.name in ("process", "sft")]


def _table(arms: Sequence[Arm], columns: dict) -> str:
    return _markdown(
        ["arm", "seeds", *columns],
        [[arm.name, str(len(arm.runs)), *(cell(arm) for cell in columns.values())] for arm in arms],
    )


def _differences(arms: Sequence[Arm]) -> str:
    """Return a row for each pair, the later arm less the earlier one; nothing for one arm."""
    rows = [
        [f"{arm.name} - {other.name}", f"{len(arm.runs)}, {len(other.runs)}"]
        + [
            _bounded(paired_difference(arm.counts(which), other.counts(which), k), "+.1f")
            for which in STAGES
            for k in (1, 16)
        ]
        for other, arm in combinations(arms, 2)
    ]
    columns = [f"{stage} pass@{k}" for stage in STAGES.values() for k in (1, 16)]
    return _markdown(["difference", "seeds", *columns], rows) if rows else ""


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _bounded(found: Pooled | Difference, form: str) -> str:
    mean, low, high = (format(100 * value, form) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def _pass(which: str, k: int):
    def cell(arm: Arm) -> str:
        return _bounded(pooled_pass_at_k(arm.counts(which), k), ".1f")

    return cell


def _successes(arm: Arm) -> str:
    values = arm.curve("prime", SUCCESSES)
    return f"{100 * values.mean():.1f}" if values.size else "-"


def _last(metric: str, scale: float):
    def cell(arm: Arm) -> str:
        values = arm.curve("prime", metric)
        return f"{scale * values[:, -1].mean():.1f}" if values.size else "-"

    return cell


_RIVAL_COLUMNS = {
    "groups with a success": _successes,
    "stage 1 pass@1": _pass("primed", 1),
    "stage 1 pass@16": _pass("primed", 16),
    "stage 2 pass@1": _pass("final", 1),
    "stage 2 pass@16": _pass("final", 16),
}
_ABLATION_COLUMNS = {
    "segments a trace": _last(SEGMENTS, 1),
    "of one segment": _last(SINGLE, 100),
    **{name: cell for name, cell in _RIVAL_COLUMNS.items() if name != "groups with a success"},
}
