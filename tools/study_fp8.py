"""Trains the miniature in every precision of recipes/configs/fp8-study.yaml: `python tools/study_fp8.py [run|report]`.

`run` makes what is missing, one run after the other, and then reports; `report` prints the table of what is finished:
reward, the gap between the trainer's log-probs (rounded as the FP8 recipe would) and the sampler's (fp32), gradients.
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
COLUMNS = (
    "precision",
    "reward, last 3 steps",
    "held-out pass@1, before and after",
    "gap, step 1",
    "gap, later steps",
    "largest gap, later steps",
    "gradient norm, later steps",
)


def runs_of(study: dict) -> list[StudyRun]:
    """One run for each precision, with the same seed."""
    runs = []
    for name, precision in study["precisions"].items():
        policy = study["run"]["policy"] | {"precision": precision}
        directory = f"{study['directory']}/{name.replace(', ', '-').replace(' ', '-')}"
        tree = study["run"] | {"directory": directory, "policy": policy}
        runs.append(StudyRun(name, tree["seed"], check_config(tree, f"{STUDY}, {name}")))
    return runs


def row(run: StudyRun) -> list[str]:
    """A finished run as a row of COLUMNS; gaps in nats a token."""
    steps = [json.loads(line)["metrics"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in steps if "grad_norm" in metrics]
    first, *later = steps
    before, after = (_share(path) for path in run.evaluations)
    return [
        run.arm,
        f"{statistics.fmean(metrics['reward/mean'] for metrics in steps[-3:]):.3f}",
        f"{before:.3f} → {after:.3f}",
        f"{first['sampler_gap/mean']:.1e}",
        f"{statistics.fmean(metrics['sampler_gap/mean'] for metrics in later):.1e}",
        f"{max(metrics['sampler_gap/max'] for metrics in later):.1e}",
        f"{statistics.fmean(metrics['grad_norm'] for metrics in later):.3f}",
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
    print(table([row(run) for run in runs if run.done]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
