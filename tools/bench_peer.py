"""A whole step of sparse-reward RL with this project and with TRL's GRPOTrainer: sampling, grading, learning, sync.

Both have the same model, problems, lengths and precision (fp32) and two cores: this project as two trainer ranks and
two servers with one thread each or as one of each with two threads, TRL as two processes or one likewise. Both are
started, then they take turns step by step, and the processes of the one that waits are stopped. The first step of each
is left out. `make bench-peer` installs TRL and runs this.

    python tools/bench_peer.py [--tasks miniature smollm2-135m] [--rounds 10 4] [--ours 2] [--trl 1] [--json F]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import yaml
from benchmarks import peer_tasks
from benchmarks.peer_tasks import Task
from benchmarks.turns import Contestant, StepCost
from prepare_smollm import prepare as prepare_smollm

from exprl_megatron.errors import UserError
from exprl_megatron.processes.interruption import end_on_signals
from exprl_megatron.runs.directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "peer"
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"
EXPRL = Path(sys.executable).with_name("exprl")
DEADLINE_S = 600.0
"""For a step, and for the start-up before the first."""
OURS, THEIRS = "this project", "TRL"
PARTS = {
    "sampling and grading": ("sample_and_grade",),
    "learning": ("log_probs", "train"),
    "sync": ("sync",),
}
"""What a step's seconds are divided into, and the spans of a timeline that each is made of."""


def miniature(scratch: Path) -> Task:
    """Return the demo's second stage: 16 problems of 16 traces of at most 60 new tokens, from a primed policy."""
    model = BUILD / "primed"
    if not model.is_dir():
        run, examples, config = scratch / "prime", scratch / "chains.jsonl", scratch / "prime.yaml"
        peer_tasks.write_worked_chains(examples)
        config.write_text(yaml.safe_dump(peer_tasks.priming_config(ROOT / "recipes/miniature/policy", examples, run)))
        subprocess.run([EXPRL, "train", config], check=True, stdout=subprocess.DEVNULL)
        shutil.move(run / "models" / "prime", model)
    problems = scratch / "miniature.jsonl"
    peer_tasks.write_problems(ROOT / "recipes/miniature/train.jsonl", 16, problems)
    return Task(
        "miniature",
        model,
        problems,
        problems_per_step=16,
        group_size=16,
        max_new_tokens=60,
        temperature=1.0,
        answer_pattern=r"ans\s+(\d+)",
        max_tokens=160,
        micro_batch_tokens=8192,
        our_processes=2,
        trl_processes=2,
    )


def smollm2(scratch: Path) -> Task:
    """SmolLM2-135M-Instruct on GSM8K test questions: 2 problems of 4 traces of at most 48 new tokens."""
    everything, problems = scratch / "gsm8k-test.jsonl", scratch / "smollm2.jsonl"
    prepare = [sys.executable, ROOT / "tools/prepare_data.py", "gsm8k-test", "--out", everything]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    peer_tasks.write_problems(everything, 2, problems)
    return Task(
        "smollm2-135m",
        prepare_smollm(ROOT / "build" / "smollm2-135m-instruct"),
        problems,
        problems_per_step=2,
        group_size=4,
        max_new_tokens=48,
        temperature=0.8,
        answer_pattern=r"\\boxed\{([^}]*)\}",
        max_tokens=512,
        micro_batch_tokens=1024,
        our_processes=2,
        trl_processes=1,
        system="Reason step by step and put the final answer in \\boxed{}.",
    )


TASKS = {"miniature": miniature, "smollm2-135m": smollm2}


def ours(task: Task, directory: Path, steps: int) -> Contestant:
    """`exprl train`."""
    run, config = directory / "ours", directory / "ours.yaml"
    config.write_text(yaml.safe_dump(peer_tasks.our_config(task, run, steps)))
    environment = os.environ | {"OMP_NUM_THREADS": str(peer_tasks.threads(task.our_processes))}
    command = [str(EXPRL), "train", str(config)]
    return Contestant(OURS, command, environment, RunDirectory(run).timeline, directory / "ours.log")


def theirs(task: Task, directory: Path, steps: int) -> Contestant:
    """tools/peer/trl_grpo.py in TRL's environment."""
    run, file = directory / "trl", directory / "trl.json"
    run.mkdir()
    settings = peer_tasks.trl_task(task, run, steps)
    file.write_text(json.dumps(settings))
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={task.trl_processes}"]
    command = [PEER_PYTHON, *(several if task.trl_processes > 1 else []), ROOT / "tools/peer/trl_grpo.py", file]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
    return Contestant(THEIRS, [*map(str, command)], environment, RunDirectory(run).timeline, directory / "trl.log")


def compare(task: Task, directory: Path, rounds: int) -> dict[str, list[StepCost]]:
    """`rounds` steps of each, in turns, after the first of each; what each took."""
    # One step more than is waited for: what comes at the end of a run is not part of a step.
    both = [build(task, directory, rounds + 2) for build in (theirs, ours)]
    with ExitStack() as running:
        for contestant in both:
            running.enter_context(contestant)
            contestant.take_step(DEADLINE_S)
        for _ in range(rounds):
            for contestant in both:
                contestant.take_step(DEADLINE_S)
    return {contestant.name: contestant.costs for contestant in both}


def response_tokens(task: Task, directory: Path) -> dict[str, float]:
    """Return median tokens of a step's traces."""
    traces = task.problems_per_step * task.group_size
    found = {}
    for name, run in ((OURS, "ours"), (THEIRS, "trl")):
        lines = (directory / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = median(traces * json.loads(line)["metrics"]["length/mean"] for line in lines)
    return found


def table(task: str, costs: dict[str, Sequence[StepCost]], tokens: dict[str, float]) -> str:
    """Return medians over the steps, and how many times as fast we are."""
    heads = ("", "seconds a step (least to most)", *PARTS, "rest", "CPU seconds", "response tokens")
    lines = [f"{task}, medians of {len(costs[OURS])} steps each", _row(heads), "|---" * len(heads) + "|"]
    for name, steps in costs.items():
        walls = [step.wall_s for step in steps]
        parts = [median(sum(step.parts.get(span, 0.0) for span in spans) for step in steps) for spans in PARTS.values()]
        cells = [*parts, median(walls) - sum(parts), median(step.cpu_s for step in steps)]
        whole = f"{median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})"
        lines.append(_row((name, whole, *(f"{cell:.2f}" for cell in cells), f"{tokens[name]:.0f}")))
    by_clock, by_cpu = (speed(costs, value) for value in ("wall_s", "cpu_s"))
    lines.append(f"this project's speed: {by_clock:.2f} times TRL's by the clock, {by_cpu:.2f} by CPU time")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def speed(costs: dict[str, Sequence[StepCost]], value: str) -> float:
    """TRL's median over ours."""
    mine, other = (median(getattr(step, value) for step in costs[name]) for name in (OURS, THEIRS))
    return other / mine


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--rounds", nargs="+", type=int, default=[10, 4], help="steps of each trainer, for each task")
    for flag, who in (("--ours", "this project"), ("--trl", "TRL")):
        parser.add_argument(flag, type=int, choices=(1, 2), help=f"processes of {who} (default: the task's)")
    parser.add_argument("--keep", type=Path, help="leave the runs in this new directory")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(arguments)
    if len(args.rounds) != len(args.tasks):
        parser.error(f"--rounds gives {len(args.rounds)} numbers for {len(args.tasks)} tasks; give one for each task")
    if not PEER_PYTHON.is_file():
        parser.error(f"{PEER_PYTHON} is missing; run tools/setup_peer.sh")
    end_on_signals()
    BUILD.mkdir(parents=True, exist_ok=True)
    found = []
    with ExitStack() as stack:
        scratch = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=BUILD)))
        scratch.mkdir(parents=True, exist_ok=args.keep is None)
        for name, rounds in zip(args.tasks, args.rounds, strict=True):
            try:
                task = TASKS[name](scratch)
                task = replace(
                    task,
                    our_processes=args.ours or task.our_processes,
                    trl_processes=args.trl or task.trl_processes,
                )
                directory = scratch / name
                directory.mkdir()
                costs = compare(task, directory, rounds)
            except UserError as error:
                parser.exit(1, f"bench_peer: {error}\n")
            tokens = response_tokens(task, directory)
            print(table(name, costs, tokens), flush=True)
            figures = {who: [asdict(step) for step in steps] for who, steps in costs.items()}
            speeds = {value: speed(costs, value) for value in ("wall_s", "cpu_s")}
            found.append({"task": name, "speed": speeds, "tokens": tokens, "steps": figures})
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
