"""A directory that is being written: resumable, and renamed to its final name when complete."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.utils.files import Claim, write_atomically

PLAN = "plan.json"


class Partial:
    """`target` while it is written: `path` is its name plus `.partial`, and only this process has it.

    `plan` (JSON-able) says what will be written from what. What an interrupted conversion of the same plan left is
    kept, anything else removed. `advance` receives the bytes done and in all.

    Raises:
        UserError: `target` exists or another process is at work; as a context manager also where the disk fails within.
    """

    def __init__(self, target: Path, plan: dict, needed_bytes: int, advance: Callable[[int, int], None]):
        self.target = target
        self._advance, self._done, self._needed = advance, 0, needed_bytes
        if target.exists():
            raise UserError(f"{target} exists already; choose another place, or remove it.")
        self.path = target.with_name(target.name + ".partial")
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(self.path)
        self.resumed = self._is_of(plan)
        if not self.resumed:
            self._empty()
            free = shutil.disk_usage(self.path).free
            if free < needed_bytes:
                self._claim.release()
                shutil.rmtree(self.path)
                raise UserError(
                    f"{target} needs {needed_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make room."
                )
            write_atomically(self.path / PLAN, json.dumps(plan).encode())

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._claim.release()
        # Torch's writer of tensors raises a RuntimeError that hides the cause.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError):
            raise UserError(
                f"{self.target} could not be finished ({reason}); make room if that is the reason, and give the same "
                f"command again: it continues from here."
            ) from error

    def note(self, number: int) -> Path:
        """Return the marker file of the finished part `number`; markers are deleted at the end."""
        return self.path / f"written-{number}"

    def wrote(self, count: int) -> None:
        """Report that `count` more bytes are written."""
        self._done += count
        self._advance(self._done, self._needed)

    def finish(self, account: Callable[[], None]) -> None:
        """Give the directory its final name, unless `account` raises UserError.

        Where it does, nothing of what was written is gone on with.
        """
        try:
            account()
        except UserError:
            (self.path / PLAN).unlink()
            raise
        for path in (*self.path.glob("written-*"), self.path / PLAN, self.path / "lock"):
            path.unlink()
        _sync(self.path)
        self.path.rename(self.target)
        _sync(self.target.parent)

    def _is_of(self, plan: dict) -> bool:
        try:
            return json.loads((self.path / PLAN).read_text(encoding="utf-8")) == json.loads(json.dumps(plan))
        except (OSError, ValueError):
            return False

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()


def file_marks(paths: list[Path]) -> list[list]:
    """Name, size and modification time of files, to detect changes."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
