"""Measures the host's work in a step besides the model: processor seconds and memory of each station, and their growth.

Every station and size is measured in a process of its own, with one thread. A module in tools/benchmarks/host
that has a STATION is a row. `in the kernel` is how many of the nanoseconds a token the kernel takes, mostly for memory
that the process uses for the first time. `by traces` and `by length` are exponents of growth: of four times as many
traces, and of traces that are eight times as long. The share is that of a 404 s step, the planner's for a 70B model and
2,048 traces.

    python tools/bench_host.py [--stations NAME ...] [--sizes 512x2000 ...] [--model DIR] [--json F]
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.host.station import measured, stations
from benchmarks.host.workload import Workload

SIZES = ("512x2000", "2048x2000", "2048x6000", "2048x16000")
STEP_S = 404.0
STEP_SIZE = "2048x2000"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stations", nargs="+", help="measure only these, by their names")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="traces x mean tokens")
    parser.add_argument("--model", type=Path, default=Workload.model, help="directory with the tokenizer for judging")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(arguments)
    known = stations()
    names = args.stations or list(known)
    for name in names:
        if name not in known:
            parser.error(f"there is no station {name!r}; choose of {', '.join(known)}")
    torch.set_num_threads(1)
    steps = {size: Workload(*map(int, size.split("x")), model=args.model) for size in args.sizes}
    costs = {name: {size: asdict(measured(name, step)) for size, step in steps.items()} for name in names}
    print(table(costs, {name: known[name].blocks for name in names}))
    if args.json is not None:
        args.json.write_text(json.dumps(costs, indent=1))


def exponent(costs: dict[str, dict], small: str, large: str, of: str) -> str:
    """Return how the processor's time grows with `of` from one size to the other, as text."""
    if small not in costs or large not in costs:
        return "-"
    ratio = costs[large]["cpu_s"] / costs[small]["cpu_s"]
    return f"{math.log(ratio) / math.log(costs[large][of] / costs[small][of]):.2f}"


def table(costs: dict[str, dict[str, dict]], blocking: dict[str, bool]) -> str:
    """Return all figures as a Markdown table."""
    sizes = list(next(iter(costs.values())))
    heads = ["station", *(f"{size}: CPU s" for size in sizes), *(f"{size}: peak MB" for size in sizes)]
    heads += ["ns a token", "in the kernel", "by traces", "by length", f"share of {STEP_S:.0f} s"]
    rows, total = [], 0.0
    for name, of_size in costs.items():
        share = "not waited for"
        if STEP_SIZE in of_size and blocking[name]:
            total += of_size[STEP_SIZE]["cpu_s"]
            share = f"{of_size[STEP_SIZE]['cpu_s'] / STEP_S:.2%}"
        last = of_size[sizes[-1]]
        rows.append(
            [
                name,
                *(f"{of_size[size]['cpu_s']:.2f}" for size in sizes),
                *(f"{of_size[size]['peak_mb']:.0f}" for size in sizes),
                f"{last['cpu_s'] / last['tokens'] * 1e9:.0f}",
                f"{last['kernel_s'] / last['tokens'] * 1e9:.0f}",
                exponent(of_size, "512x2000", "2048x2000", "traces"),
                exponent(of_size, "2048x2000", "2048x16000", "tokens"),
                share,
            ]
        )
    rows.append(["**all that the trainer waits for**", *[""] * (2 * len(sizes) + 4), f"**{total / STEP_S:.2%}**"])
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
