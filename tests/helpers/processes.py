"""Processes that tests have started: those below one, whether they have ended, and waits for what they do."""

import time
from collections.abc import Callable, Iterable

import psutil

from exprl_megatron.processes.descendants import descendants, existing


def family(pid: int) -> list[psutil.Process]:
    """All processes below `pid`, each behind its parent."""
    return existing(descendants(pid))


def running(process: psutil.Process | int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_behind(processes: Iterable[psutil.Process], deadline_s: float = 120) -> list[psutil.Process]:
    """Those that do not end; a deadline that only a loaded machine comes near, as nobody waits where all have ended."""
    left, deadline = list(processes), time.monotonic() + deadline_s
    while (left := [process for process in left if running(process)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def wait_until(condition: Callable[[], object], deadline_s: float) -> None:
    """Wait until the condition holds; the deadline is for a test that would hang, however loaded the machine is."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened within {deadline_s} s"
        time.sleep(0.002)
