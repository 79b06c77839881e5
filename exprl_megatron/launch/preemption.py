"""Slurm's signal ahead of a time limit or a preemption: the run ends at its next checkpoint, and can be resumed.

The launcher answers SIGUSR1, and nobody else: Slurm may send it to every process of a job. It leaves the request as
a file in the run's directory, where rank 0 finds it after each step and in each long wait, on whichever node it runs.
"""

import signal
from pathlib import Path
from typing import NoReturn

from exprl_megatron.errors import Preempted
from exprl_megatron.processes.interruption import raise_from_handler


def stop_on_sigusr1() -> None:
    """From now on SIGUSR1 raises Preempted: there is nothing yet to be saved."""
    signal.signal(signal.SIGUSR1, _end)


def request_stop_on_sigusr1(request: Path) -> None:
    """From now on SIGUSR1 makes the file `request`, which RankCoordinator.asked_to_stop sees."""
    signal.signal(signal.SIGUSR1, lambda *_: request.touch())


def ignore_sigusr1() -> None:
    """From now on SIGUSR1 means nothing here: the run says when its servers end."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _end(*_) -> NoReturn:
    error = Preempted("The run was asked to stop before its trainer was started; start it again.")
    raise_from_handler(signal.SIGUSR1, error)
