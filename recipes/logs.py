"""A submitted experiment from another process: its state, what its components wrote, and its end."""

import difflib
import shlex
import subprocess
from pathlib import Path

import nemo_run as run
from nemo_run.config import get_nemorun_home

from exprl_megatron.errors import UserError
from recipes.experiment import outcomes

_LISTED = 5
"""Experiments that an error names."""


def find(name: str) -> run.Experiment:
    """Return the experiment of that id, or the latest of that title; UserError where there is none."""
    for look in (run.Experiment.from_id, run.Experiment.from_title):
        try:
            return look(name)
        except (AssertionError, FileNotFoundError):
            continue
    raise UserError(_unknown(name))


def _unknown(name: str) -> str:
    """That there is no experiment `name`, and which there are: the nearest one, or the latest ones."""
    root = Path(get_nemorun_home()) / "experiments"
    titles = [path.name for path in root.glob("*") if path.is_dir()]
    ids = {path.name: path.stat().st_mtime for title in titles for path in (root / title).glob("*") if path.is_dir()}
    if not ids:
        return f"There is no experiment {name} in {root}, which has none; see NEMORUN_HOME."
    if near := difflib.get_close_matches(name, [*titles, *ids], n=1):
        return f"There is no experiment {name} in {root}; did you mean {near[0]}?"
    latest = sorted(ids, key=ids.__getitem__, reverse=True)
    more = f", and {len(latest) - _LISTED} earlier ones" if len(latest) > _LISTED else ""
    return f"There is no experiment {name} in {root}; there are {', '.join(latest[:_LISTED])}{more}."


def print_status(name: str) -> bool:
    """Print one line for each job; whether none has failed. Raises UserError where NeMo-Run has lost sight of one."""
    with find(name) as experiment:
        found = outcomes(experiment)
    for job, state in found.items():
        print(f"{job}: {state}")
    if lost := [job for job, state in found.items() if state == "UNKNOWN"]:
        raise UserError(
            f"NeMo-Run has no word of {' and '.join(lost)}; ask `sacct` or `squeue`, "
            f"or see `python -m recipes logs {name}`."
        )
    return not {"FAILED", "CANCELLED"} & set(found.values())


def print_logs(name: str, lines: int) -> None:
    """Print the last `lines` of whatever a job's components, its servers and its trainer ranks wrote."""
    with find(name) as experiment:
        for job, tasks in zip(experiment.jobs, experiment.tasks, strict=True):
            tasks = tasks if isinstance(tasks, list) else [tasks]
            kinds = ", ".join(f"{i} {task.metadata['component']}" for i, task in enumerate(tasks))
            print(f"#### {job.id}: {kinds}", flush=True)
            print(_tails(job.executor, tasks[0].metadata["run"], lines), flush=True)


def cancel(name: str) -> None:
    """End every job of an experiment."""
    with find(name) as experiment:
        for job in experiment.jobs:
            experiment.cancel(job.id)


def _tails(executor: run.Executor, directory: str, lines: int) -> str:
    """Return the ends of a job's log files and of those in its run's directory, each under its name."""
    if isinstance(executor, run.SlurmExecutor):
        jobs = f"{Path(executor.tunnel.job_dir) / Path(executor.job_dir).name}/log-*"
    else:
        jobs = f"{executor.job_dir}/nemo_run/*/*/0/combined.log"
    of_run = " ".join(f"{shlex.quote(directory)}/{place}/*.log" for place in ("servers", "logs"))
    command = f"tail -v -n {lines} $(ls {jobs} {of_run} 2>/dev/null) </dev/null"
    if isinstance(executor, run.SlurmExecutor):
        executor.tunnel.connect()
        return executor.tunnel.run(command, hide=True, warn=True).stdout
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout
