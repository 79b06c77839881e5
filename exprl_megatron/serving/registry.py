"""The servers of a run, each in a file of a directory that all of the run's machines see.

Whoever keeps servers writes a server's file when it is ready and removes it when it is not; whoever sends requests
reads them. A server that was started anew has the same name and another incarnation.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from exprl_megatron.files import write_atomically

Kind = Literal["policy", "judge", "start", "router"]


@dataclass(frozen=True)
class RegisteredServer:
    """A server that is ready for requests."""

    kind: Kind
    name: str
    """As in messages: `policy-0`."""
    url: str
    log_file: str
    """On the machine that the server runs on."""
    incarnation: str
    """Differs from start to start of the same server."""


class Registry:
    """Registrations in `directory`, as `<name>.json`; the directory need not exist yet."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._ended = directory / "ended"

    def register(self, server: RegisteredServer) -> None:
        """Make the server known; replaces an earlier incarnation."""
        write_atomically(self._file(server.name), json.dumps(asdict(server)).encode())

    def withdraw(self, name: str) -> None:
        """Make the server unknown; does nothing where it is."""
        self._file(name).unlink(missing_ok=True)
        self._wish(name).unlink(missing_ok=True)

    def find(self, name: str) -> RegisteredServer | None:
        """The server of that name, if it is registered."""
        try:
            text = self._file(name).read_text()
        except FileNotFoundError:
            return None
        # One that is removed while it is read may be seen empty.
        return RegisteredServer(**json.loads(text)) if text else None

    def all(self) -> list[RegisteredServer]:
        """All registered servers, by name."""
        found = (self.find(file.stem) for file in sorted(self.directory.glob("*.json")))
        return [server for server in found if server is not None]

    def ask_restart(self, server: RegisteredServer) -> None:
        """Ask whoever keeps the server to start it anew, since this incarnation of it is of no use."""
        write_atomically(self._wish(server.name), server.incarnation.encode())

    def restart_asked(self, name: str) -> str | None:
        """The incarnation of the server that is to be started anew, if any."""
        try:
            return self._wish(name).read_text()
        except FileNotFoundError:
            return None

    def end(self) -> None:
        """Tell whoever keeps the servers that the run has ended."""
        write_atomically(self._ended, b"")

    def ending(self) -> int | None:
        """When the run was last said to have ended (nanoseconds of that file's clock), or None."""
        try:
            return self._ended.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def begin(self) -> None:
        """Forget that an earlier attempt at the run has ended."""
        self._ended.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _wish(self, name: str) -> Path:
        return self.directory / f"{name}.restart"
