"""What a study of several arms and seeds came to: pooled pass@k with intervals, tables, curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exprl_megatron.evaluation.pass_at_k import RESAMPLES, pass_at_k

Counts = dict[str, list[int]]
"""Problem -> [graded samples, right ones]."""

SUCCESSES = "groups with a success"
_NO_SUCCESS = "verifier/all_wrong_groups"
SEGMENTS = "segments/mean"
SINGLE = "segments/single_share"


@dataclass(frozen=True)
class Evaluated:
    """One finished run: evaluations after both stages, and the records of its steps ({stage, step, metrics})."""

    arm: str
    seed: int
    primed: Counts
    final: Counts
    steps: list[dict]

    def curve(self, stage: str, metric: str) -> list[float]:
        """The metric at each step of `stage` that has it; SUCCESSES is 1 less the share of all-wrong groups."""
        if metric == SUCCESSES:
            return [1 - value for value in self.curve(stage, _NO_SUCCESS)]
        return [s["metrics"][metric] for s in self.steps if s["stage"] == stage and metric in s["metrics"]]


@dataclass(frozen=True)
class Arm:
    """All runs of one arm."""

    name: str
    runs: list[Evaluated]

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


def pooled_pass_at_k(counts: Sequence[Counts], k: int, confidence: float = 0.95) -> Pooled:
    """pass@k over the problems of one evaluation for each seed.

    The interval is a percentile bootstrap that draws seeds and problems anew (2,000 times, seeded): it covers the
    choice of problems and the luck of a run. Raises ValueError where seeds were evaluated on different problems.
    """
    problems = sorted(counts[0])
    if any(sorted(of_seed) != problems for of_seed in counts):
        raise ValueError("the seeds of an arm were evaluated on different problems")
    values = np.array([[pass_at_k(*of_seed[problem], k) for problem in problems] for of_seed in counts])
    draw = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        seeds = draw.integers(len(values), size=len(values))
        chosen = draw.integers(len(problems), size=len(problems))
        means[i] = values[np.ix_(seeds, chosen)].mean()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Pooled(float(values.mean()), float(low), float(high), tuple(map(float, values.mean(axis=1))))


def results(arms: Sequence[Arm], ks: Sequence[int] = (1, 16)) -> dict:
    """Everything in JSON's terms: arm -> {seeds, primed: {pass@k}, final: {pass@k}, curves of both stages}."""
    return {
        arm.name: {
            "seeds": [run.seed for run in arm.runs],
            "primed": {f"pass@{k}": vars(pooled_pass_at_k([r.primed for r in arm.runs], k)) for k in ks},
            "final": {f"pass@{k}": vars(pooled_pass_at_k([r.final for r in arm.runs], k)) for k in ks},
            "curves": {
                stage: {metric: arm.curve(stage, metric).tolist() for metric in (SUCCESSES, SEGMENTS, SINGLE)}
                for stage in ("prime", "sparse")
            },
        }
        for arm in arms
    }


def tables(arms: Sequence[Arm], ablations: Sequence[str]) -> str:
    """The rivals, and the ablations below them, as Markdown."""
    rivals = [arm for arm in arms if arm.name not in ablations]
    others = [arm for arm in arms if arm.name in ablations or arm.name in ("process", "sft")]
    parts = [
        "Percent; in brackets the 95 % interval over seeds and problems. Groups with a success: share of the groups "
        "of 16 traces, over all steps of stage 1, in which at least one final answer was right.",
        _table(rivals, _RIVAL_COLUMNS),
        "The ablations, beside what they change:",
        _table(others, _ABLATION_COLUMNS),
        f"![Curves of both stages](study/curves.svg)\n\nFinished runs: {sum(len(arm.runs) for arm in arms)}.",
    ]
    return "\n\n".join(parts)


def curves(arms: Sequence[Arm], path: Path) -> None:
    """Groups with a success (by the verifier) over the steps of both stages: the mean of the seeds and their range."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, stage, title in zip(axes, ("prime", "sparse"), ("stage 1", "stage 2"), strict=True):
        for number, arm in enumerate(arms):
            values = arm.curve(stage, SUCCESSES)
            if values.size:
                steps, colour = range(1, values.shape[1] + 1), f"C{number}"
                axis.plot(steps, values.mean(axis=0), color=colour, label=arm.name)
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="step")
    axes[0].set_ylabel("groups with a success")
    axes[1].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _table(arms: Sequence[Arm], columns: dict) -> str:
    rows = [["arm", "seeds", *columns]] + [
        [arm.name, str(len(arm.runs)), *(cell(arm) for cell in columns.values())] for arm in arms
    ]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _pass(which: str, k: int):
    def cell(arm: Arm) -> str:
        pooled = pooled_pass_at_k([getattr(run, which) for run in arm.runs], k)
        return f"{100 * pooled.mean:.1f} [{100 * pooled.low:.1f}, {100 * pooled.high:.1f}]"

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
