"""Trains the miniature in every precision of recipes/configs/fp8-study.yaml: `python tools/study_fp8.py [run|report]`.

`run` makes what is missing, one run after the other, and then reports; `report` prints the table of what is finished:
reward, and the gap between the trainer's log-probs (rounded as the FP8 recipe would) and the sampler's (fp32).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import yaml
from study import ROOT, StudyRun, execute

from exprl_megatron.config.load import check_config

STUDY = ROOT / "recipes" / "configs" / "fp8-study.yaml"
QUARTERS = (slice(1, 8), slice(8, 16), slice(16, 24), slice(24, 32))
"""Of the steps; the first step is on its own, as delayed scaling has seen no amax in it."""
COLUMNS = (
    "precision",
    "seed",
    "reward, steps 25 to 32",
    "entropy",
    "held-out pass@1, before and after",
    "gap, step 1",
    "gap, steps 25 to 32",
    "KL, steps 2 to 8, to 16, to 24, to 32",
    "largest gap, from step 2",
)


def runs_of(study: dict) -> list[StudyRun]:
    """Return every precision with every seed; all precisions with the first one come first."""
    runs = []
    for seed in study["seeds"]:
        for name, precision in study["precisions"].items():
            policy = study["run"]["policy"] | {"precision": precision}
            directory = f"{study['directory']}/{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            tree = study["run"] | {"directory": directory, "seed": seed, "policy": policy}
            runs.append(StudyRun(name, seed, check_config(tree, f"{STUDY}, {name}")))
    return runs


def row(run: StudyRun) -> list[str]:
    """Return a finished run as a row of COLUMNS; gaps (mean of absolute differences), KL (k3) and entropy in nats a
    token.
    """
    steps = [json.loads(line)["metrics"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in steps if "grad_norm" in metrics]

    def mean(name: str, which: slice = QUARTERS[-1]) -> float:
        return statistics.fmean(metrics[name] for metrics in steps[which])

    before, after = (_share(path) for path in run.evaluations)
    return [
        run.arm,
        str(run.seed),
        f"{mean('reward/mean'):.3f}",
        f"{mean('entropy'):.3f}",
        f"{before:.3f} → {after:.3f}",
        f"{steps[0]['sampler_gap/mean']:.1e}",
        f"{mean('sampler_gap/mean'):.1e}",
        ", ".join(f"{mean('sampler_gap/k3', quarter):.1e}" for quarter in QUARTERS),
        f"{max(metrics['sampler_gap/max'] for metrics in steps[1:]):.1e}",
    ]


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(path: Path) -> float:
    """Right samples of all graded ones."""
    counts = json.loads(path.read_text())["counts"].values()
    return sum(right for _, right in counts) / sum(graded for graded, _ in counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"), nargs="?", default="run")
    runs = runs_of(yaml.safe_load(STUDY.read_text()))
    good = all([execute(run) for run in runs]) if parser.parse_args().what == "run" else True
    names = [run.arm for run in runs]
    print(table([row(run) for run in sorted(runs, key=lambda run: names.index(run.arm)) if run.done]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
