"""Files that are complete or do not exist, and directories that one process has locked.

Why neither filelock nor atomicwrites: the lock is one call of flock, which the kernel releases even after kill -9, and
atomicwrites is no longer maintained.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from exprl_megatron.errors import UserError, holds_no_files


class Claim:
    """An exclusive lock on an existing directory, held until this process ends or `release` is called.

    Raises:
        UserError: another process holds the lock.
    """

    def __init__(self, root: Path):
        self._file = open(root / "lock", "w")  # noqa: SIM115 - held open for as long as the claim lives
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(f"Another process is running in {root}; wait for it, or stop it.") from error

    @classmethod
    def is_held(cls, root: Path) -> bool:
        """Return whether a live process, this one included, has the directory; it need not exist."""
        if not (root / "lock").is_file():
            return False
        try:
            cls(root).release()
        except UserError:
            return True
        return False

    def release(self) -> None:
        """Release the directory."""
        self._file.close()


def keep_private(root: Path) -> None:
    """Make new files of this process and its children, and all files in `root`, accessible to their owner only."""
    os.umask(0o077)
    if root.is_dir():
        for path in (root, *root.rglob("*")):
            if not path.is_symlink() and (mode := path.stat().st_mode) & 0o077:
                path.chmod(stat.S_IMODE(mode) & 0o700)


def require_directory(path: Path) -> None:
    """Check that `path` is a directory in which this user may write, or that one can be created there.

    Raises:
        UserError: it is not.
    """
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if holds_no_files(path):
        raise UserError(f"Cannot use {path}, which the kernel keeps; choose a directory on a disk.")
    if not there.is_dir():
        raise UserError(f"Cannot use {path}: {there} is a file; choose a path whose parts are directories.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"Cannot use {path}: this user may not write to {there}; choose another directory.")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash leaves either the old file or the whole new one."""
    with open_atomically(path) as file:
        file.write(content)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write to that becomes `path` at the end: a crash or an error leaves the old file or none.

    It is there under its name when this returns, also after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Return when the names in `directory` are on disk: syncing a file does not sync its name."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
