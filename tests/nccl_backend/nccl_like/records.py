"""What the backend noticed, in this process and, by way of a directory, in all others."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIRECTORY = "NCCL_LIKE_RECORDS"
PATIENCE = "NCCL_LIKE_PATIENCE_S"
_FRAMES = 12
LIBRARIES = ("/torch/", "/nccl_like/")


def record(kind: str, text: str) -> None:
    """Keep a line about something of `kind`: connected, object, or a fault: hang, differs, same device, timeout."""
    line = json.dumps({"kind": kind, "text": text, "process": os.getpid(), "at": time.time()})
    if kind not in ("connected", "object"):
        print(f"nccl_like: {kind}: {text}", file=sys.stderr, flush=True)
    if DIRECTORY in os.environ:
        with open(Path(os.environ[DIRECTORY]) / f"{os.getpid()}.jsonl", "a") as file:
            file.write(line + "\n")


def read_records(directory: Path, *kinds: str) -> list[dict[str, Any]]:
    """What all processes recorded in `directory`, of `kinds` alone where any are given."""
    lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
    found = sorted((json.loads(line) for line in lines), key=lambda one: one["at"])
    return [one for one in found if not kinds or one["kind"] in kinds]


def patience_s() -> float | None:
    """How long a process may block without a timeout; None: for ever."""
    return float(os.environ[PATIENCE]) if os.environ.get(PATIENCE) else None


class Hang(RuntimeError):
    """NCCL would block here for ever."""


class Patience:
    """Raises and records Hang when a wait that has no timeout lasts longer than `patience_s()`."""

    def __init__(self, what: Callable[[], str]):
        self._what = what
        self._since = time.monotonic()
        self._bound = patience_s()

    def check(self) -> None:
        """To be called again and again in the wait."""
        waited_s = time.monotonic() - self._since
        if self._bound is not None and waited_s > self._bound:
            stack = "".join(traceback.format_stack()[-_FRAMES:-1])
            text = f"blocked for {waited_s:.0f} s in {self._what()}\n{stack}"
            record("hang", text)
            raise Hang(text)


def watch_objects(is_ours: Callable[[Any], bool]) -> None:
    """Record each object that is pickled to be sent over a group that `is_ours`."""
    import torch.distributed.distributed_c10d as c10d

    to_tensor = c10d._object_to_tensor

    def watched(obj, device, group, *args, **kwargs):
        if is_ours(group if group is not None else c10d._get_default_group()):
            stack = traceback.extract_stack()[:-1]
            frame = next(f for f in reversed(stack) if not any(part in f.filename for part in LIBRARIES))
            record("object", f"{type(obj).__name__} from {frame.filename}:{frame.lineno} in {frame.name}")
        return to_tensor(obj, device, group, *args, **kwargs)

    c10d._object_to_tensor = watched
