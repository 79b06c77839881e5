"""What sampling ahead gains and costs, in the miniature: seconds of a step and reward reached, for each max_staleness.

Runs of sparse-reward RL that differ in nothing but `max_staleness`, on two cores: one sampling server and one trainer
rank. The problems are chains of one to seven sums, most of them short and few long, and so are the traces. Runs take
turns `--rounds` times over with a seed for each round, so that other work on the machine falls on all alike. What was
reached is pass@1 of the last weights on held-out problems: the rewards of a run's steps are of weights that are behind.

    python tools/bench_async.py [--staleness 0 1 4] [--steps 20] [--rounds 2] [--json F]
"""

import argparse
import json
import tempfile
from pathlib import Path
from random import Random
from statistics import fmean

import chains

from exprl_megatron.config.load import check_config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.launch.launcher import launch
from exprl_megatron.reporting.metrics import read_metrics
from exprl_megatron.runs.directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1,) * 8 + (2,) * 4 + (3,) * 2 + (5, 7)
"""Steps of a problem's chain, drawn evenly."""
PROBLEMS, HELD_OUT, SAMPLES = 2048, 128, 4


def write_problems(path: Path, count: int = PROBLEMS, seed: str = "bench async") -> None:
    """Return `count` problems, always the same for a seed."""
    rng = Random(seed)
    rows = []
    for i in range(count):
        chain = chains.chain_problem(rng, rng.choice(LENGTHS))
        rows.append({"id": f"p{i}", "problem": chains.problem_text(chain), "answer": chains.answer_text(chain)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_config(directory: Path, problems: Path, held_out: Path, max_staleness: int, steps: int, seed: int) -> RunConfig:
    """Return one run; all have the correction, which changes nothing where nothing is stale."""
    sampling = {"temperature": 1.0, "max_new_tokens": 80}
    stage = {
        "kind": "sparse-rl",
        "name": "sparse",
        "steps": steps,
        "max_staleness": max_staleness,
        "problems": {"source": str(problems)},
        "problems_per_step": 16,
        "group_size": 16,
        "sampling": sampling,
        "loss": {"correction": {"kind": "truncated", "level": "token", "high": 2.0}},
        "optimizer": {"lr": 1.0e-4, "betas": [0.9, 0.95]},
    }
    model = str(ROOT / "recipes" / "miniature" / "policy")
    tree = {"directory": str(directory), "seed": seed, "policy": {"model": model, "max_tokens": 160}}
    tree["evaluation"] = {"problems": {"source": str(held_out)}, "samples": SAMPLES, "k": [1], "sampling": sampling}
    return check_config(tree | {"checkpoint": {"every_steps": steps}, "stages": [stage]}, "bench_async")


def reached(paths: RunDirectory, name: str) -> float:
    """pass@1 of an evaluation."""
    (estimate,) = json.loads((paths.evaluations / f"{name}.json").read_text())["estimates"]
    return estimate["mean"]


def figures(records: list[dict]) -> dict[str, float]:
    """Return means over all of one run's steps: those in which the pipeline fills are dear, the last ones cheap."""
    every = [record["metrics"] for record in records if record["step"]]
    return {
        "step_s": fmean(step["seconds/step"] for step in every),
        "wait_s": fmean(step["seconds/sample_and_grade"] for step in every),
        "train_s": fmean(step["seconds/train"] for step in every),
        "sync_s": fmean(step.get("seconds/sync", 0.0) for step in every),
        "length_mean": fmean(step["length/mean"] for step in every),
        "length_max": max(step["length/max"] for step in every),
        "staleness_mean": fmean(step.get("staleness/mean", 0.0) for step in every),
        "effective": fmean(step["correction/effective"] for step in every),
    }


def table(found: dict[int, list[dict[str, float]]]) -> str:
    """Return a row for each max_staleness: the mean over its rounds, and how it compares with the first row."""
    means = {n: {name: fmean(run[name] for run in runs) for name in runs[0]} for n, runs in found.items()}
    first = next(iter(means.values()))
    lines = [
        "| max_staleness | s a step | of the first row's | waits | train | sync | steps behind | effective "
        "| pass@1 before | pass@1 after, by round |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n, mean in means.items():
        after = ", ".join(f"{run['after']:.3f}" for run in found[n])
        lines.append(
            f"| {n} | {mean['step_s']:.2f} | {mean['step_s'] / first['step_s']:.2f} | {mean['wait_s']:.2f} "
            f"| {mean['train_s']:.2f} | {mean['sync_s']:.2f} | {mean['staleness_mean']:.2f} | {mean['effective']:.3f} "
            f"| {mean['before']:.3f} | {after} |"
        )
    lines.append(f"\ntraces of {first['length_mean']:.1f} tokens on average, up to {first['length_max']:.0f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--steps", type=int, default=20, help="more than the largest staleness and 1")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.steps < max(args.staleness) + 2:
        parser.error(f"--steps is {args.steps}; give at least {max(args.staleness) + 2}")
    found: dict[int, list[dict[str, float]]] = {n: [] for n in args.staleness}
    with tempfile.TemporaryDirectory() as root:
        problems, held_out = Path(root) / "problems.jsonl", Path(root) / "held_out.jsonl"
        write_problems(problems)
        write_problems(held_out, HELD_OUT, "bench async, held out")
        for seed in range(args.rounds):
            for n in args.staleness:
                config = run_config(Path(root) / f"staleness-{n}-{seed}", problems, held_out, n, args.steps, seed)
                launch(config, resume=False)
                paths = RunDirectory(config.directory)
                ends = {"before": reached(paths, "start"), "after": reached(paths, "sparse")}
                found[n].append(figures(read_metrics(paths.metrics)) | ends)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
