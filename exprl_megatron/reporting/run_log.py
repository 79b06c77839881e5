"""The lines of a run: on the terminal, and in RUN/logs/run.log, so that a closed terminal loses none."""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

STARTED = "EXPRL_STARTED"
"""In the environment of a run's processes: when its command started, in seconds since the epoch."""


def command_started() -> float:
    """Return the seconds since the epoch when the command started: of this process, unless the environment says
    otherwise.
    """
    return float(os.environ.get(STARTED) or psutil.Process().create_time())


def _print(line: str) -> None:
    print(line, flush=True)


class RunLog:
    """Prints lines with the time since the start of the command; from `keep` on, a file has them too.

    Several processes may append to the same file: each line is one write.
    """

    def __init__(self, started: float | None = None, show: Callable[[str], None] = _print):
        self._started = command_started() if started is None else started
        self._show = show
        self._path: Path | None = None
        self._early: list[str] = []

    def keep(self, path: Path) -> None:
        """Append what was printed so far, and all that follows, to `path`."""
        self._path = path
        early, self._early = self._early, []
        self._append("".join(early))

    def say(self, text: str) -> None:
        """Print `text` as one line and append it to the log."""
        line = f"[{duration(time.time() - self._started)}] {text}"
        self._show(line)
        dated = f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}\n"
        if self._path is None:
            self._early.append(dated)
        else:
            self._append(dated)

    def _append(self, text: str) -> None:
        if not text or self._path is None:
            return
        with open(self._path, "a", encoding="utf-8", errors="replace") as file:
            file.write(text)


def duration(seconds: float) -> str:
    """Return the seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
