"""Throws random faults at a long miniature run and says what it made of them: `make chaos`.

The run ends after the last fault. Exit status 1 where a trace was lost, counted twice or learned from under wrong
weights or other than a server sent it, where somebody without a key was let in, a damaged checkpoint was loaded, fewer
faults were thrown than wanted, or the reward did not grow.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from benchmarks.chaos import FaultedRun, Outcome

from exprl_megatron.config.load import load_config
from exprl_megatron.utils.files import write_atomically

WEIGHTS = {
    "a sampling server is killed": 14,
    "the judge is killed": 8,
    "a sampling server hangs": 14,
    "the judge hangs": 8,
    "a sampling server answers 500": 22,
    "the judge answers 500": 12,
    "a sampling server replies garbage": 28,
    "the judge replies garbage": 16,
    "a sampling server gets requests without a key": 16,
    "the judge gets requests without a key": 8,
    "the router gets requests without a key": 4,
    "a sampling server has old weights": 20,
    "a sampling server is killed in a weight update": 8,
    "the router is killed": 4,
    "the trainer is killed": 3,
    "the trainer is killed in a weight update": 3,
    "a rank is stopped": 4,
    "the newest checkpoint is damaged": 8,
}
"""Two hundred faults usually; those that cost a start of a server or of the trainer are rarer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("recipes/configs/chaos.yaml"))
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="Minutes after which no further fault is injected."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=5.0, help="Seconds between a step and the next fault, at most.")
    parser.add_argument("--longest", type=float, default=30.0, help="Seconds that a server misbehaves, at most.")
    parser.add_argument("--deadline", type=float, default=1800.0, help="Seconds for the step after a fault.")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    outcomes: list[Outcome] = []
    with FaultedRun(config, arguments.seed, arguments.longest) as run:
        weights = {kind: weight for kind, weight in WEIGHTS.items() if kind in run.kinds}
        run.until(lambda: run.learned() >= 1, arguments.deadline)
        began = time.monotonic()
        while (
            len(outcomes) < arguments.faults
            and run.learned() < config.stages[0].steps
            and time.monotonic() - began < 60 * arguments.minutes
        ):
            run.pause(arguments.pause)
            kind = run.choose(weights)
            print(f"{len(outcomes) + 1}: {kind}", flush=True)
            outcomes.append(run.throw(kind, arguments.deadline))
            print(f"{len(outcomes)}: {asdict(outcomes[-1])}", flush=True)
        run.end()
        found = run.wrong()
    lines = run.paths.metrics.read_text().splitlines()
    rewards = [json.loads(line)["metrics"]["reward/mean"] for line in lines]
    quarter = len(rewards) // 4
    first, last = statistics.fmean(rewards[:quarter]), statistics.fmean(rewards[-quarter:])
    grown = f"reward of the first quarter {first:.3f}, of the last {last:.3f}"
    garbage = ", ".join(f"{kind}: {count}" for kind, count in sorted(run.garbage.items()))
    seen = f"{run.replies.counts} were sent; garbage: {garbage or 'none'}"
    report = f"{table(outcomes)}\n{seen}\n{grown}; wrong: {'; '.join(found) or 'nothing'}"
    print(report)
    write_atomically(run.paths.root / "chaos.txt", report.encode())
    sys.exit(1 if found or last <= first or len(outcomes) < arguments.faults else 0)


def table(outcomes: list[Outcome]) -> str:
    """Of each kind of fault: how often, and what the run did."""
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    heads = ("fault", "thrown", "went on", "stopped and resumed", "with a restart", "median s to the next step")
    rows = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for kind, of_kind in sorted(by_kind.items()):
        ended = sum(bool(outcome.ended) for outcome in of_kind)
        restarted = sum(outcome.restarted for outcome in of_kind)
        seconds = statistics.median(outcome.seconds for outcome in of_kind)
        rows.append(f"| {kind} | {len(of_kind)} | {len(of_kind) - ended} | {ended} | {restarted} | {seconds:.1f} |")
    return "\n".join([*rows, f"{len(outcomes)} faults"])


if __name__ == "__main__":
    main()
