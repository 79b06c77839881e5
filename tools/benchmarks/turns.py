"""Trainers in processes of their own that take turns on the same cores, step by step.

A trainer says in a timeline (reporting/timeline.py) what it does when. At the end of a step all of its processes are
stopped by SIGSTOP until its next turn, and the time for which they are stopped is counted nowhere.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from exprl_megatron.errors import UserError
from exprl_megatron.processes.descendants import descendants, existing
from exprl_megatron.processes.log_tail import log_tail
from exprl_megatron.reporting.timeline import STEP, Span, read_timeline

_LOOK_S = 0.005
_END_S = 15.0
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_HEARTBEAT_S = 0.3
"""A launcher continues that much later than what it has started, which it would find silent; it computes nothing."""


@dataclass(frozen=True)
class StepCost:
    """What one step took, in seconds."""

    wall_s: float
    """From the end of the step before to its own."""
    cpu_s: float
    """Of all the trainer's processes."""
    parts: Mapping[str, float]
    """Wall seconds of each span inside the step, by name."""


class Contestant:
    """One trainer. Use it as a context: its processes are ended behind it.

    `command` runs in a process group of its own with `environment` and appends to `timeline`; what it prints goes to
    `log`.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], timeline: Path, log: Path):
        self.name = name
        self.costs: list[StepCost] = []
        """Of the steps after the first, which has the start-up in it."""
        self._command, self._environment = list(command), dict(environment)
        self._timeline, self._log = timeline, log
        self._process: subprocess.Popen | None = None
        self._stops: list[tuple[float, float]] = []
        self._stopped_at: float | None = None
        self._cpu_s = 0.0
        self._ends: list[float] = []

    def __enter__(self) -> "Contestant":
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._go_on()
        processes = self.processes()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def take_step(self, deadline_s: float) -> None:
        """Let it run to the end of its next step. Raises UserError where it ends before, or does not get there."""
        self._go_on()
        give_up = time.monotonic() + deadline_s
        size = -1
        while True:
            # Reading it each time would take from the trainer's cores.
            before, size = size, self._timeline.stat().st_size if self._timeline.is_file() else 0
            if size != before and len(self._step_ends()) > len(self._ends):
                break
            if self._process.poll() is not None:
                raise UserError(f"{self.name} ended with status {self._process.returncode}{log_tail(self._log)}")
            if time.monotonic() > give_up:
                raise UserError(f"{self.name} did not finish a step within {deadline_s:g} s{log_tail(self._log)}")
            time.sleep(_LOOK_S)
        self._stop()
        cpu_s = sum(map(_cpu_s, self.processes()))
        self._ends.append(self._step_ends()[len(self._ends)])
        if len(self._ends) > 1:
            self.costs.append(self._cost(cpu_s - self._cpu_s))
        self._cpu_s = cpu_s

    def _cost(self, cpu_s: float) -> StepCost:
        return step_cost(read_timeline(self._timeline), self._stops, *self._ends[-2:], cpu_s)

    def _step_ends(self) -> list[float]:
        spans = read_timeline(self._timeline) if self._timeline.is_file() else []
        return [span.end for span in spans if span.name == STEP]

    def processes(self) -> list[psutil.Process]:
        """Return its processes that exist now, first the one that has started the others."""
        return existing((self._process.pid, *descendants(self._process.pid)))

    def _stop(self) -> None:
        # One that was just starting another has now started it or is stopped itself.
        known: set[int] = set()
        while found := {process.pid for process in self.processes()} - known:
            for pid in found:
                _send(pid, signal.SIGSTOP)
            _wait_until_stopped(found)
            known |= found
        # What was done until here is done; the next step's clock has it.
        self._stopped_at = time.time()

    def _go_on(self) -> None:
        if self._stopped_at is None:
            return
        self._stops.append((self._stopped_at, time.time()))
        self._stopped_at = None
        launcher, *others = [process.pid for process in self.processes()] or [None]
        for pid in others:
            _send(pid, signal.SIGCONT)
        if others:
            time.sleep(_HEARTBEAT_S)
        if launcher is not None:
            _send(launcher, signal.SIGCONT)


def step_cost(
    spans: Sequence[Span], stops: Sequence[tuple[float, float]], start: float, end: float, cpu_s: float
) -> StepCost:
    """Return what the step from `start` to `end` took apart from the `stops`, which are given as (from, to)."""

    def awake(first: float, last: float) -> float:
        first, last = max(first, start), min(last, end)
        stopped = sum(max(0.0, min(to, last) - max(since, first)) for since, to in stops)
        return max(0.0, last - first - stopped)

    parts: dict[str, float] = {}
    for span in spans:
        if span.name != STEP and span.start < end and span.end > start:
            parts[span.name] = parts.get(span.name, 0.0) + awake(span.start, span.end)
    return StepCost(awake(start, end), cpu_s, parts)


def _cpu_s(process: psutil.Process) -> float:
    """Of the process and of those that it has started and that have ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system + times.children_user + times.children_system


def _wait_until_stopped(pids: Iterable[int]) -> None:
    """Wait until all have taken the signal, which a process on the other core does a moment later."""
    deadline = time.monotonic() + _END_S
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            while process.status() not in _STOPPED and time.monotonic() < deadline:
                time.sleep(0.001)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
