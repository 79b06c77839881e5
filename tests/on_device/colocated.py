"""`exprl train` with trainer and servers in turns on the same devices: two steps, stopped, resumed, two more."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from exprl_megatron.runs.directory import RunDirectory
from on_device.compared import Compared, at_least, at_most, equal
from on_device.learning import MINIATURE, MODEL
from on_device.servers import FEW_GRAPHS

STEPS = 2
EVALUATED = 4
"""Problems before the first step."""
ASLEEP_GB = 4.0
"""On a GPU the sleeping side keeps its CUDA context, and a server its graphs and workspaces."""
DEADLINE_S = 240.0
PREEMPTED = 75


def config_tree(directory: Path, *, cuda: bool, layout: Mapping[str, int], servers: Mapping[str, int]) -> dict:
    """A run of the miniature that does not end by itself, with `servers` (count, tp) of its own.

    Precision, transport and the servers' share of memory are the defaults.
    """
    settings = {"extra_args": FEW_GRAPHS} if cuda else {"max_total_tokens": 4096}
    return {
        "directory": str(directory),
        "policy": {"model": str(MODEL), "layout": dict(layout), "max_tokens": 160},
        "server": settings | dict(servers),
        "placement": {"kind": "colocated", "max_asleep_gb": ASLEEP_GB},
        # Of the weights that the first step samples under too: servers that slept in between have lost them.
        "evaluation": {
            "problems": {"source": str(MINIATURE / "heldout.jsonl"), "limit": EVALUATED},
            "samples": 1,
            "k": [1],
            "sampling": {"max_new_tokens": 40},
        },
        "sync": {"max_log_prob_gap": 0.1 if cuda else 1e-4, "deadline_s": 60},
        "stages": [
            {
                "kind": "sparse-rl",
                "name": "turns",
                "steps": 100_000,
                "problems": {"source": str(MINIATURE / "train.jsonl")},
                "problems_per_step": 4,
                "group_size": 4,
                "sampling": {"max_new_tokens": 40},
                "optimizer": {"lr": 1e-4},
            }
        ],
    }


def stopped_and_resumed(tree: dict, *, cuda: bool) -> list[Compared]:
    """Run `tree` for two steps or more, stop it as Slurm does, continue, and stop it again."""
    paths = RunDirectory(tree["directory"])
    config = paths.root.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    began = time.monotonic()
    first = _steps(paths, config)
    stopped = time.monotonic()
    again = _steps(paths, config, "--resume")
    evaluated = json.loads((paths.evaluations / "start.json").read_text())
    records = _logged(paths)
    metrics = [record["metrics"] for record in records]
    agreed = sum(m.get("sync/check", 0) > 0 for m in metrics)
    count = len(records)
    what = "x".join(f"{name}{size}" for name, size in tree["policy"]["layout"].items()) or "one rank"
    asleep = [value for m in metrics for name, value in m.items() if name.endswith("/asleep")]
    gaps = [m["sampler_gap/mean"] for m in metrics]
    return [
        at_least(f"{what}: steps before the stop", first, STEPS),
        at_least(f"{what}: steps after the resume", again, STEPS),
        equal(f"{what}: every step logged once", [r["step"] for r in records] == list(range(1, count + 1)), True),
        equal(f"{what}: problems evaluated at the start", len(evaluated["counts"]), EVALUATED),
        # The evaluation's sync, after which servers that cannot sleep need no other, is in the first step's metrics.
        equal(f"{what}: steps whose checksums agreed", agreed, count),
        at_most(f"{what}: largest GiB of a sleeping side on a device", max(asleep), ASLEEP_GB),
        equal(f"{what}: the servers slept", {m["memory/servers_slept"] for m in metrics}, {float(cuda)}),
        at_most(f"{what}: mean |trainer - sampler| log-prob", max(gaps), tree["sync"]["max_log_prob_gap"]),
        Compared(f"{what}: seconds to the stop", f"{stopped - began:.0f}", "no bound", True),
        Compared(f"{what}: seconds of the resumed run", f"{time.monotonic() - stopped:.0f}", "no bound", True),
    ]


def _steps(paths: RunDirectory, config: Path, *flags: str) -> int:
    """How many steps a start of the run takes until it has stopped; fails with its last words where it does not."""
    before = len(_logged(paths))
    command = [sys.executable, "-m", "exprl_megatron.cli", "train", str(config), *flags]
    log = config.with_suffix(".log")
    with open(log, "a") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + DEADLINE_S
            while run.poll() is None and len(_logged(paths)) < before + STEPS and time.monotonic() < deadline:
                time.sleep(0.05)
            if run.poll() is None:
                run.send_signal(signal.SIGUSR1)
            status = run.wait(DEADLINE_S)
        finally:
            run.terminate()
            run.wait()
    assert status == PREEMPTED, f"{' '.join(command[2:])} ended with {status}:\n{log.read_text()[-4000:]}"
    return len(_logged(paths)) - before


def _logged(paths: RunDirectory) -> list[dict]:
    """The steps in the run's metrics, without the evaluation before the first one (step 0)."""
    lines = paths.metrics.read_text().split("\n")[:-1] if paths.metrics.is_file() else []
    return [record for record in map(json.loads, lines) if record["step"] > 0]
