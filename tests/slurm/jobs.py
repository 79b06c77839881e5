"""What tests do with jobs: submit, watch, and disturb them."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nemo_run as run
import psutil

from recipes import executors
from recipes.experiment import launch

ROOT = Path(__file__).parents[2]
_DEADLINE_S = 600


def cluster(**settings) -> run.Config:
    """The recipes' executor for Slurm, with an account and `settings`."""
    executor = executors.slurm()
    for name, value in ({"account": "tests", "time": "01:00:00", "monitor_group_job_wait_time": 1} | settings).items():
        setattr(executor, name, value)
    return executor


def submit(recipe: run.Partial, executor: run.Config) -> list[str]:
    """Submit an experiment and leave it alone; the ids of its jobs, the leader's where a job is heterogeneous."""
    before = set(records())
    launch(recipe, executor, detach=True)
    return sorted(
        (id for id, job in records().items() if id not in before and job.get("HetJobOffset", "0") == "0"), key=int
    )


def records() -> dict[str, dict[str, str]]:
    """All jobs, as `scontrol show job` tells of them, by id."""
    found = subprocess.run(["scontrol", "--oneliner", "show", "job"], check=True, capture_output=True, text=True)
    jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in found.stdout.splitlines()]
    return {job["JobId"]: job for job in jobs if "JobId" in job}


def state(job: str) -> str:
    return records()[job]["JobState"]


def started(job: str) -> float:
    """When the job's present start was, in seconds of time.time()."""
    return time.mktime(time.strptime(records()[job]["StartTime"], "%Y-%m-%dT%H:%M:%S"))


def set_time_limit(job: str, minutes: int) -> None:
    """Change the time that a running job may take, counted from its start."""
    subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"], check=True)


def idle_nodes() -> int:
    """Nodes that a job would get at once."""
    found = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%T"], check=True, capture_output=True, text=True)
    return found.stdout.split().count("idle")


@contextmanager
def without_node(node: str) -> Iterator[None]:
    """The node is lost, with what runs there, until the end of the context."""
    for lost in ("drain", "down"):
        subprocess.run(["scontrol", "update", f"NodeName={node}", f"State={lost}", "Reason=lost"], check=True)
    yield
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=resume"], check=True)


def wait_until[T](condition: Callable[[], T], what: str, poll_s: float = 0.2) -> T:
    """What `condition` returned when it first held."""
    deadline = time.monotonic() + _DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {_DEADLINE_S} s"
        time.sleep(poll_s)
    return found


def wait_for_end(job: str, expected: str) -> None:
    """Wait until the job has ended, and require that it ended so."""
    exit_error = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: state(job) in exit_error, f"the end of job {job}")
    assert state(job) == expected


def steps_done(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def wait_for_steps(directory: Path, count: int, job: str) -> None:
    """Wait until the job's run has done so many steps; it must not end before."""
    alive = ("PENDING", "RUNNING", "COMPLETING")
    wait_until(lambda: steps_done(directory) >= count or state(job) not in alive, f"step {count}", poll_s=0.02)
    assert steps_done(directory) >= count, f"job {job} ended before step {count}"


def trainers(directory: Path) -> list[psutil.Process]:
    """The trainer's ranks of the run in `directory`, without those who watch over them."""
    return processes("exprl_megatron.training.worker", str(directory))


def server(model: Path) -> psutil.Process:
    """The server of that model."""
    (found,) = processes("exprl_megatron.serving.keyed_server", str(model))
    return found


def processes(module: str, argument: str) -> list[psutil.Process]:
    """All that run `python -m module ... argument ...`, without their supervisors, which run it as a command."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        # Behind the title of a forked process there are empty words.
        command = " ".join(process.info["cmdline"] or []).split()
        if command[1:3] == ["-m", module] and argument in command:
            found.append(process)
    return found


def held(directory: Path) -> list[psutil.Process]:
    """Stop the ranks where they are, so that what happens next happens in this step; SIGCONT lets them continue."""
    ranks = trainers(directory)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    return ranks


def let_go(ranks: list[psutil.Process]) -> None:
    for rank in ranks:
        os.kill(rank.pid, signal.SIGCONT)
