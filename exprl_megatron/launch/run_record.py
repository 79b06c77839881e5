"""`run.json`: the program's version, machine, times and end of each attempt at a run."""

import json
import shlex
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from exprl_megatron.errors import exit_status
from exprl_megatron.processes.interruption import Interrupted
from exprl_megatron.utils.files import write_atomically
from exprl_megatron.version import package_versions, this_build


class RunRecord:
    """A context manager: the file exists from its start, with `end` and `exit` null until the run has ended.

    `exit` is {status, message}; it stays null where the process was killed.

    Args:
        path: the file.
        plugins: SHA-256 of the source of the user's code, by its path.
    """

    def __init__(self, path: Path, plugins: Mapping[str, str] = MappingProxyType({})):
        self._path = path
        build = this_build()
        self._record: dict[str, Any] = {
            "version": build.version,
            "commit": build.commit,
            "modified": build.modified,
            "command": shlex.join(sys.argv),
            "host": socket.gethostname(),
            "python": sys.version.split()[0],
            "start": _now(),
            "end": None,
            "exit": None,
            "packages": package_versions(),
            "plugins": dict(plugins),
            "earlier": _earlier(path),
        }

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        status = error.code if isinstance(error, Interrupted) else 0 if error is None else exit_status(error)
        self._record |= {"end": _now(), "exit": {"status": status, "message": None if error is None else str(error)}}
        try:
            self._write()
        except OSError as unwritten:
            # The error that ended the run has priority; a full disk is often that error.
            print(f"exprl: {self._path} was not completed: {unwritten}", file=sys.stderr)

    def _write(self) -> None:
        write_atomically(self._path, (json.dumps(self._record, indent=2) + "\n").encode())


def _earlier(path: Path) -> list[dict]:
    """Return the records of earlier attempts; of an unreadable file, its first characters."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        return [*last.pop("earlier"), last]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError):
        return [{"unreadable": path.read_text(encoding="utf-8", errors="replace")[:2000]}]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
