"""One trainer process: `python -m exprl_megatron.training.worker RUN_DIRECTORY` under torchrun's variables.

The rank's end is written to RUN_DIRECTORY/logs/trainer-RANK.end, for the launcher to show to the user.
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

from exprl_megatron.errors import Preempted, RunStopped, ServerError, UserError, exit_status, storage_sentence
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.processes.heartbeat import start_heartbeat
from exprl_megatron.serving.keys import read_key
from exprl_megatron.serving.registry import Registry
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.collector import collect, collect_between_steps
from exprl_megatron.utils.files import write_atomically
from exprl_megatron.utils.freed_memory import keep_freed_memory

_DAY_S = 24 * 3600.0
_CLOSE_LOGS_S = 1.5

_end_lock = threading.RLock()
"""The thread that fails first writes the rank's end alone."""


def main() -> None:
    """Run the rank; exit status 0, 2 (the user can fix it), 75 (asked to stop) or 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--servers", type=Path, required=True, help="Directory in which the servers are registered.")
    arguments = parser.parse_args()
    start_heartbeat()
    sys.exit(guarded(arguments.directory, arguments.servers))


def guarded(directory: Path, servers: Path) -> int:
    """Run the rank and return its exit status; errors are written to the rank's `.end` file."""
    from exprl_megatron.weight_sync.coordinator import RankZeroFailed

    end = directory / "logs" / f"trainer-{os.environ['RANK']}.end"
    # Closed after the end is written: the launcher waits only briefly for a rank that knows the cause.
    logs = ExitStack()

    def end_at_once(error: BaseException) -> None:
        """End the process from any thread, while the main one may wait in a collective; all data is on disk."""
        with _end_lock:
            sys.stdout.flush()
            os._exit(_write_end(end, error))

    with logs:
        try:
            work(directory, Registry(servers), end_at_once, logs)
        except RankZeroFailed:
            return 1
        except BaseException as error:  # torch's failures in collectives are no subclasses of Exception
            return _write_end(end, error)
    return 0


def _write_end(end: Path, error: BaseException) -> int:
    """Write how the rank ends; returns its exit status."""
    status, message, unexpected = exit_status(error), str(error), False
    if (sentence := storage_sentence(error, end.parent.parent)) is not None:
        message = sentence
    elif isinstance(error, PluginError):
        # The sentence names one line; the log has the others.
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
    """Build this rank's part of the run and take it to its end; `on_failure` is RolloutPrefetch's.

    `logs` closes the run's logs when it is closed.
    """
    # The libraries make a million objects that stay: looked through again and again, they cost a sixth of the start.
    gc.disable()
    from exprl_megatron.plugins.loading import use_plugin_path
    from exprl_megatron.policy.world import enter_world, leave_world
    from exprl_megatron.runs.directory import RunDirectory, read_config
    from exprl_megatron.training.assemble import assemble
    from exprl_megatron.training.loop import run_stages

    if not uses_cuda():
        keep_freed_memory()
    collect_between_steps()
    paths = RunDirectory(directory)
    config = read_config(paths)
    use_plugin_path(config.plugin_path)
    enter_world(config.policy.layout, config.seed, _longest_wait(config), key=read_key(registry.key_file))
    run = assemble(config, paths, registry, on_failure)
    logs.callback(run.close_logs, _CLOSE_LOGS_S)
    # What the run is made of stays as well, but for what loading it has left.
    collect()
    collect_between_steps()
    run_stages(run)
    run.close()
    leave_world()


def _longest_wait(config) -> float:
    """The longest that rank 0 may work while the other ranks wait for it in a collective, in seconds."""
    judge = config.judge.server.start_deadline_s + _longest_judging(config) if config.needs_judge else 0.0
    return config.server.start_deadline_s + config.server.request_deadline_s + config.sync.deadline_s + judge + 60.0


def _longest_judging(config) -> float:
    """Sum of the deadlines of a step's judgements, the gate's and a rubric's, with `concurrency` requests in flight.

    At most a day for the judgements: before that many deadlines pass, abstentions stop the run.
    """
    from exprl_megatron.config.stages import JudgedStage
    from exprl_megatron.judging.judged_traces import read_judged_traces

    judgements = max(
        (1 + stage.max_staleness) * stage.problems_per_step * stage.group_size * stage.judgements_per_trace
        for stage in config.stages
        if isinstance(stage, JudgedStage)
    )
    if config.judge.gate is not None:
        judgements += 3 * len(read_judged_traces(config.judge.gate.traces, config.judge.gate.limit, config.domains))
    rounds = math.ceil(judgements / config.judge.concurrency)
    judging_s = min(rounds * config.judge.deadline_s, max(_DAY_S, config.judge.deadline_s))
    return judging_s + config.judge.rubric.deadline_s


if __name__ == "__main__":
    main()
