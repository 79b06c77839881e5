"""Heartbeats of a rank: a file that it touches, so that the launcher detects a rank that is stopped rather than dead.

A rank that waits in a collective beats on; one that was sent SIGSTOP, whose container was frozen or that hangs in the
kernel does not. The file has no name and is on the rank's own machine; nothing is compared with the clock.
"""

import os
import tempfile
import threading
import time
from contextlib import suppress

import psutil

from exprl_megatron.processes.descendants import child_pids
from exprl_megatron.processes.supervise import HEARTBEAT

SILENCE_S = 45.0
"""A rank without a heartbeat for this many seconds has failed."""
_BEAT_S = 2.0


def start_heartbeat() -> None:
    """Touch this rank's file from now on, in a thread of its own; does nothing where there is none to touch."""
    if file := os.environ.pop(HEARTBEAT, None):
        threading.Thread(target=_beat, args=(int(file),), name="heartbeat", daemon=True).start()


def _beat(file: int) -> None:
    number = 0
    while True:
        number += 1
        # Another time than before, whatever the clock does. Nothing is written, so a full disk does not matter.
        os.utime(file, ns=(number, number))
        time.sleep(_BEAT_S)


class RankHeartbeat:
    """The launcher's side of one rank."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open until `close`
        self._last = self._beats()
        self._heard: float | None = None

    @property
    def file(self) -> int:
        """The descriptor that the rank must inherit, and finds in its environment."""
        return self._file.fileno()

    def silent_s(self) -> float:
        """Return the seconds since the rank's last heartbeat, counted from the first call; call several times a
        minute.
        """
        if (beats := self._beats()) != self._last or self._heard is None:
            self._last, self._heard = beats, time.monotonic()
        return time.monotonic() - self._heard

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _beats(self) -> int:
        return os.fstat(self.file).st_mtime_ns


def states(supervisor: int) -> list[str]:
    """Return the states of the processes that `supervisor` runs, as `stopped` or `disk-sleep`."""
    found: list[str] = []
    for child in child_pids(supervisor):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(child).status())
    return found
