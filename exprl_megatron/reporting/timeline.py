"""The timeline of a run: one JSON object for every span of work, in timeline.jsonl."""

import json
import math
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from exprl_megatron.errors import UserError

STEP = "step"
"""The span of a whole step, but for the checkpoint behind it."""
ROLLOUTS = "sample_and_grade"
"""The trainer waits for the step's graded groups."""
SAMPLING, GRADING = "sampling", "grading"
"""From the step's first request to its last finished trace; from its first finished trace to its last grade."""


@dataclass(frozen=True)
class Span:
    """Work of one step, in seconds since the epoch."""

    stage: str
    step: int
    name: str
    """STEP, ROLLOUTS, SAMPLING, GRADING, or what the trainer does: sync, log_probs, train, save."""
    start: float
    end: float

    def inside(self, start: float, end: float) -> float:
        """Return how many of its seconds are between `start` and `end`."""
        return max(0.0, min(self.end, end) - max(self.start, start))


class Timeline:
    """Appends spans to a file; several threads may."""

    def __init__(self, path: Path):
        _drop_cut_off_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        """Append `span`; it is on disk when this returns."""
        record = asdict(span) | {"start": round(span.start, 4), "end": round(span.end, 4)}
        with self._lock:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _drop_cut_off_line(path: Path) -> None:
    """Remove a line that a killed run did not finish, so that the next record starts on a new line."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def read_timeline(path: Path) -> list[Span]:
    """Return all spans in the order in which they ended; a last line cut off by a crash is left out.

    Raises:
        UserError: there is no such file, or a line is damaged.
    """
    if not path.is_file():
        raise UserError(f"There is no {path}; name the directory of a run that has taken a step.")
    spans = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            spans.append(_span(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} line {number} is damaged ({error}); delete that line.") from error
    return spans


def _span(line: bytes) -> Span:
    span = Span(**json.loads(line))
    if not (math.isfinite(span.start) and math.isfinite(span.end)):
        raise ValueError("start and end are not finite numbers")
    return span
