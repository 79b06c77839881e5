"""How long a run takes to start, and what memory its processes share and hold: `exprl train` to the end of a step.

Prints when the servers were ready, the ranks had their libraries, the starting policy was evaluated and the first step
ended, in seconds since the command; the processor seconds of all processes until then; and the proportional set size
(PSS: a page that n processes share counts a nth for each) of every process when their sum was largest. The run is ended
after the step, unless `--whole`.

    python tools/bench_startup.py [CONFIG [OVERRIDES...]] [--interval SECONDS] [--whole] [--json F]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from exprl_megatron.config.load import load_config
from exprl_megatron.processes.descendants import descendants, existing
from exprl_megatron.reporting.metrics import read_metrics
from exprl_megatron.runs.directory import RunDirectory

ROOT = Path(__file__).parents[1]
_POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """One process when all held most."""

    name: str
    pss_mb: float
    private_mb: float
    """Of its PSS what no other process has."""


@dataclass
class Startup:
    """What was measured."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Since the command, by what had been reached."""
    cpu_s: float = 0.0
    """Of all processes, until the end of the first step."""
    peak_mb: float = 0.0
    processes: list[Process] = field(default_factory=list)


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "recipes/configs/demo.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--interval", type=float, default=1.0, help="Seconds between two readings of the memory; 0: no readings."
    )
    parser.add_argument("--whole", action="store_true", help="Let the run continue to its end.")
    parser.add_argument("--json", type=Path, help="Write the figures to this file.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="exprl-startup-") as directory:
        overrides = [*arguments.overrides, f"directory={directory}/run"]
        found = measure(arguments.config, overrides, arguments.interval, arguments.whole)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(found), indent=2))
    print_startup(found)


def measure(config: Path, overrides: list[str], interval_s: float, whole: bool) -> Startup:
    """Start the run of `config`, and watch it until its first step, or itself, has ended."""
    paths = RunDirectory(load_config(config, overrides).directory)
    log = paths.root.with_suffix(".log")
    found, cpu, look_at = Startup(), {}, 0.0
    started = time.monotonic()
    command = [sys.executable, "-m", "exprl_megatron.cli", "train", str(config), *overrides]
    with open(log, "wb") as output:
        run = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        while run.poll() is None and (whole or "first step" not in found.seconds):
            now = time.monotonic() - started
            for what in reached(paths) - found.seconds.keys():
                found.seconds[what] = round(now, 2)
            if "first step" not in found.seconds or not cpu:
                cpu |= processor_seconds(run)
            if interval_s and now >= look_at:
                look(run, found)
                look_at = time.monotonic() - started + interval_s
            time.sleep(_POLL_S)
    finally:
        if run.poll() is None:
            run.terminate()
        run.wait()
    if "first step" not in found.seconds:
        sys.exit(f"the run ended with status {run.returncode} before a step did:\n{log.read_text()[-3000:]}")
    found.cpu_s = round(sum(cpu.values()), 1)
    return found


def reached(paths: RunDirectory) -> set[str]:
    """Return what the run has reached by now, from the files that it leaves."""
    found = {f"{file.stem} ready" for file in paths.registry.glob("*.json")}
    if paths.timeline.exists():
        found.add("libraries of rank 0")
    if any(paths.evaluations.glob("start*.json")):
        found.add("starting policy evaluated")
    # Step 0 is the evaluation before a stage.
    if any(record["step"] for record in read_metrics(paths.metrics)):
        found.add("first step")
    return found


def family(run: psutil.Process) -> list[psutil.Process]:
    """Return the run's process and all below it."""
    return [run, *existing(descendants(run.pid))]


def processor_seconds(run: psutil.Process) -> dict[tuple[int, float], float]:
    """Of each process, without those of its children that have ended."""
    found = {}
    for process in family(run):
        try:
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def look(run: psutil.Process, found: Startup) -> None:
    """Keep the processes' memory where it is the largest so far."""
    seen = []
    for process in family(run):
        try:
            seen.append(_memory(process))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue
    total = sum(process.pss_mb for process in seen)
    if total > found.peak_mb:
        found.peak_mb, found.processes = total, seen


def _memory(process: psutil.Process) -> Process:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size.split()[0]) / 1024 for name, size in (line.split(":") for line in rollup)}
    private = sizes.get("Private_Clean", 0.0) + sizes.get("Private_Dirty", 0.0)
    return Process(_name(process.cmdline()), round(sizes.get("Pss", 0.0), 1), round(private, 1))


def _name(command: list[str]) -> str:
    """Return a short name: the module or script and what tells it from its siblings."""
    words = " ".join(command).split()
    module = next((word for word in words[::-1] if word.startswith("exprl_megatron.")), None)
    port = next((f" {words[i + 1]}" for i, word in enumerate(words[:-1]) if word == "--port"), "")
    supervised = "supervisor of " if any(word.endswith("supervise.py") for word in words) else ""
    return supervised + (module or " ".join(words[:3])) + port


def print_startup(found: Startup) -> None:
    """Both tables."""
    for what, seconds in sorted(found.seconds.items(), key=lambda pair: pair[1]):
        print(f"{seconds:8.1f} s  {what}")
    print(f"{found.cpu_s:8.1f} s  of processors until the end of the first step")
    if not found.processes:
        return
    print(f"\n{found.peak_mb:8.0f} MB PSS of all processes at the peak, of it private:")
    for process in sorted(found.processes, key=lambda process: -process.pss_mb):
        print(f"{process.pss_mb:8.0f} {process.private_mb:8.0f}  {process.name}")


if __name__ == "__main__":
    main()
