"""Runs the study of recipes/configs/study.yaml and tells what came out: `python tools/study.py [run|report]`.

`run` makes every arm with every seed, a few at a time, continues where it stopped, and then reports. `report` reads
what is finished and writes <directory>/results.json, docs/study/curves.svg and pass.svg, and the tables into
docs/study.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from ablation_tables import Arm, Evaluated, results, tables
from study_picture import draw, draw_curves, read_tables

from exprl_megatron.config.load import check_config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.reporting.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "recipes" / "configs" / "study.yaml"
DOCUMENT = ROOT / "docs" / "study.md"
CURVES = ROOT / "docs" / "study" / "curves.svg"
PASS = ROOT / "docs" / "study" / "pass.svg"
BEGIN, END = "<!-- results: written by tools/study.py -->", "<!-- end of results -->"


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed."""

    arm: str
    seed: int
    config: RunConfig

    @property
    def directory(self) -> Path:
        return Path(self.config.directory)

    @property
    def evaluations(self) -> list[Path]:
        """After stage 1 (of the base arm: before any) and after stage 2."""
        first = "start" if len(self.config.stages) == 1 else self.config.stages[0].name
        return [self.directory / "evaluations" / f"{name}.json" for name in (first, self.config.stages[-1].name)]

    @property
    def done(self) -> bool:
        return all(path.is_file() for path in self.evaluations)


def study_runs(study: dict, directory: str) -> list[StudyRun]:
    """Return every seed of the arms, then of the ablations: what matters most comes first."""
    runs = []
    for arms in (study["arms"], study["ablations"]):
        for seed in study["seeds"]:
            for arm, prime in arms.items():
                stages = [stage for stage in (prime, study["stage2"]) if stage is not None]
                tree = study["run"] | {"directory": f"{directory}/{arm}-{seed}", "seed": seed, "stages": stages}
                runs.append(StudyRun(arm, seed, check_config(tree, f"{STUDY}, arm {arm}")))
    return runs


def execute(run: StudyRun) -> bool:
    """Take one run to its end, from its current state; returns whether it got there."""
    if run.done:
        return True
    run.directory.parent.mkdir(parents=True, exist_ok=True)
    file = run.directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    has_started = (run.directory / "config.yaml").is_file()
    command = [sys.executable, "-m", "exprl_megatron.cli", "train", str(file), *(["--resume"] if has_started else [])]
    started = time.monotonic()
    with run.directory.with_suffix(".log").open("a") as log:
        status = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    outcome = "done" if run.done else f"ended with status {status.returncode}, see {log.name}"
    print(f"{run.arm} with seed {run.seed}: {outcome} after {time.monotonic() - started:.0f} s", flush=True)
    return run.done


def evaluated(run: StudyRun) -> Evaluated:
    """Return what a finished run left: counts of right answers, and the metrics of its steps."""
    before, after = (json.loads(path.read_text())["counts"] for path in run.evaluations)
    steps = read_metrics(run.directory / "metrics.jsonl")
    return Evaluated(run.arm, run.seed, before, after, steps)


def report(study: dict, runs: list[StudyRun]) -> None:
    """Tables and curves of the finished runs."""
    finished = [evaluated(run) for run in runs if run.done]
    arms = [Arm(name, [e for e in finished if e.arm == name]) for name in (*study["arms"], *study["ablations"])]
    arms = [arm for arm in arms if arm.runs]
    (ROOT / study["directory"] / "results.json").write_text(
        json.dumps(results(arms, tuple(study["ablations"])), indent=1)
    )
    draw_curves(arms, ("prime", "sparse"), CURVES)
    text = tables(arms, tuple(study["ablations"]))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    draw(read_tables(text), PASS)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"), nargs="?", default="run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; each wants about one core")
    parser.add_argument("--arm", action="append", help="run only these arms (may be repeated)")
    arguments = parser.parse_args()
    study = yaml.safe_load(STUDY.read_text())
    runs = study_runs(study, study["directory"])
    failed = []
    if arguments.what == "run":
        chosen = [run for run in runs if arguments.arm is None or run.arm in arguments.arm]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            failed = [run for run, good in zip(chosen, pool.map(execute, chosen), strict=True) if not good]
    report(study, runs)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
