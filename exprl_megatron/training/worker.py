"""One trainer process: `python -m exprl_megatron.training.worker RUN_DIRECTORY` under torchrun's variables.

The exit report of the rank is written to RUN_DIRECTORY/logs/trainer-RANK.end, which the launcher shows to the user.
"""

import argparse
import gc
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from exprl_megatron.errors import Preempted, RunStopped, ServerError, UserError, exit_status, storage_sentence
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.processes.heartbeat import start_heartbeat
from exprl_megatron.serving.keys import read_key
from exprl_megatron.serving.registry import Registry
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.collector import collect, collect_between_steps
from exprl_megatron.utils.files import write_atomically
from exprl_megatron.utils.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from exprl_megatron.config.run import RunConfig
    from exprl_megatron.runs.directory import RunDirectory

_DAY_S = 24 * 3600.0
_CLOSE_LOGS_S = 1.5

_end_lock = threading.RLock()
"""Only the thread that fails first writes the exit report."""


def main() -> None:
    """Run the rank; the exit status is 0, 2 (the user can fix the error), 75 (asked to stop) or 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--servers", type=Path, required=True, help="Directory in which the servers are registered.")
    arguments = parser.parse_args()
    start_heartbeat()
    sys.exit(run_rank(arguments.directory, arguments.servers))


def run_rank(directory: Path, servers: Path) -> int:
    """Run the rank and return its exit status; errors are written to the rank's `.end` file."""
    from exprl_megatron.weight_sync.coordinator import RankZeroFailed

    end = directory / "logs" / f"trainer-{os.environ['RANK']}.end"
    # Closed after the report is written: the launcher waits only briefly for the rank with the cause.
    logs = ExitStack()

    def exit_now(error: BaseException) -> None:
        """End the process from any thread, since the main one may wait in a collective; all data is on disk."""
        with _end_lock:
            sys.stdout.flush()
            os._exit(_write_end(end, error))

    with logs:
        try:
            work(directory, Registry(servers), exit_now, logs)
        except RankZeroFailed:
            return 1
        except BaseException as error:  # torch's errors in collectives are not subclasses of Exception
            return _write_end(end, error)
    return 0


def _write_end(end: Path, error: BaseException) -> int:
    """Write the exit report of the rank; returns its exit status."""
    status, message, unexpected = exit_status(error), str(error), False
    if (sentence := storage_sentence(error, end.parent.parent)) is not None:
        message = sentence
    elif isinstance(error, PluginError):
        # The message names one line; the log has the whole traceback.
        traceback.print_exception(error)
    elif not isinstance(error, UserError | ServerError | RunStopped | Preempted):
        traceback.print_exception(error)
        message, unexpected = f"trainer {os.environ['RANK']} failed: {type(error).__name__}: {error}", True
    with _end_lock:
        try:
            # Another node's launcher may read the file at any time.
            write_atomically(end, json.dumps({"status": status, "message": message, "unexpected": unexpected}).encode())
        except OSError:
            # On a full disk the log, which is open already, may still accept it.
            print(message, file=sys.stderr)
    return status


def work(directory: Path, registry: Registry, on_failure: Callable[[BaseException], None], logs: ExitStack) -> None:
    """Build this rank's part of the run and run it to its end.

    Args:
        directory: directory of the run.
        registry: registrations of the servers.
        on_failure: see RolloutPrefetch.
        logs: gets a callback that closes the run's logs.
    """
    # The libraries create a million permanent objects; their repeated collection would take a sixth of the start.
    gc.disable()
    from exprl_megatron.runs.directory import RunDirectory, read_config

    paths = RunDirectory(directory)
    config = read_config(paths)
    # First: a rank that lacks a module of the user ends before the others have done any work.
    prepare_plugins(config, paths)
    from exprl_megatron.policy.world import enter_world, leave_world
    from exprl_megatron.training.assemble import assemble
    from exprl_megatron.training.loop import run_stages

    if not uses_cuda():
        keep_freed_memory()
    collect_between_steps()
    enter_world(config.policy.layout, config.seed, _longest_wait(config), key=read_key(registry.key_file))
    run = assemble(config, paths, registry, on_failure)
    logs.callback(run.close_logs, _CLOSE_LOGS_S)
    # The objects of the run are permanent as well; only temporary objects of loading are collected.
    collect()
    collect_between_steps()
    run_stages(run)
    run.close()
    leave_world()


def prepare_plugins(config: "RunConfig", paths: "RunDirectory") -> None:
    """Load the functions of the user that every rank calls, and expect the problems that the launcher read.

    Raises:
        PluginError: one cannot be loaded on this rank.
    """
    from exprl_megatron.config.losses import Surrogate
    from exprl_megatron.config.stages import RlStage
    from exprl_megatron.plugins.calling import Plugin
    from exprl_megatron.plugins.loading import use_plugin_path
    from exprl_megatron.problems.contents import expect_problems

    use_plugin_path(config.plugin_path)
    expect_problems(paths.recorded_problems(config))
    for number, stage in enumerate(config.stages):
        if isinstance(stage, RlStage) and stage.loss.surrogate not in get_args(Surrogate):
            Plugin.load(f"stages.{number}.loss.surrogate", stage.loss.surrogate)


def _longest_wait(config) -> float:
    """Return the maximum time in seconds for which ranks wait in a collective for rank 0."""
    judge = config.judge.server.start_deadline_s + _longest_judging(config) if config.needs_judge else 0.0
    return config.server.start_deadline_s + config.server.request_deadline_s + config.sync.deadline_s + judge + 60.0


def _longest_judging(config) -> float:
    """Sum the deadlines of the judgements of a step, the gate and a rubric, with `concurrency` requests in flight.

    The judgements count at most a day: abstentions stop the run before more deadlines pass.
    """
    from exprl_megatron.config.stages import JudgedStage
    from exprl_megatron.judging.labeled_traces import read_labeled_traces

    judgements = max(
        (1 + stage.max_staleness) * stage.problems_per_step * stage.group_size * stage.judgements_per_trace
        for stage in config.stages
        if isinstance(stage, JudgedStage)
    )
    if config.judge.gate is not None:
        judgements += 3 * len(read_labeled_traces(config.judge.gate.traces, config.judge.gate.limit, config.domains))
    rounds = math.ceil(judgements / config.judge.concurrency)
    judging_s = min(rounds * config.judge.deadline_s, max(_DAY_S, config.judge.deadline_s))
    return judging_s + config.judge.rubric.deadline_s


if __name__ == "__main__":
    main()
