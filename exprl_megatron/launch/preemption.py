"""Slurm's signal before a time limit or a preemption: the run ends at its next checkpoint, and can be resumed.

Only the launcher handles SIGUSR1, since Slurm may send it to every process of a job. It writes the request as a file in
the run's directory, where rank 0 finds it after each step and in each long wait, also on another node.
"""

import signal
from pathlib import Path
from typing import NoReturn

from exprl_megatron.errors import Preempted
from exprl_megatron.processes.interruption import raise_from_handler


def stop_on_sigusr1() -> None:
    """Make SIGUSR1 raise Preempted, since there is nothing to save yet."""
    signal.signal(signal.SIGUSR1, _end)


def request_stop_on_sigusr1(request: Path) -> None:
    """Make SIGUSR1 create the file `request`, which RankCoordinator.asked_to_stop reads."""
    signal.signal(signal.SIGUSR1, lambda *_: request.touch())


def ignore_sigusr1() -> None:
    """Ignore SIGUSR1: the run decides when its servers end."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _end(*_) -> NoReturn:
    error = Preempted("The run was asked to stop before its trainer was started; start it again.")
    raise_from_handler(signal.SIGUSR1, error)
