"""The servers of a run, each in a file of a directory that all of the run's machines see.

The supervisor writes a server's file when the server is ready and removes it when it has ended; clients read the files.
A restarted server has the same name and another `instance_id`.

Why not etcd or torch's TCPStore: a run already needs a shared directory, which survives the processes on every machine
and which a user can read.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.keys import Key, fingerprint, read_key
from exprl_megatron.utils.files import write_atomically

Kind = Literal["policy", "judge", "ref", "router"]


@dataclass(frozen=True)
class RegisteredServer:
    """A server that is ready for requests."""

    kind: Kind
    name: str
    """As in messages: `policy-0`."""
    url: str
    log_file: str
    """On the machine that the server runs on."""
    instance_id: str
    """Differs from start to start of the same server."""
    run: str = ""
    """Which run it belongs to: the fingerprint of the run's key, which is in the registry's `key`."""
    key_file: str = ""
    """What holds the server's own key, where it is none of the run's."""
    first_gpu: int = 0
    """Of its machine."""
    nccl: str = ""
    """The NCCL variables that the trainer must share, as cuda_environment writes them; empty where unknown."""


class Registry:
    """Registrations in `directory`, as `<name>.json`; the directory need not exist yet."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.key_file = directory / "key"
        """The key of all servers of the run."""
        self._ended = directory / "ended"
        self._warnings: list[str] = []
        self._warned: set[str] = set()

    def register(self, server: RegisteredServer) -> None:
        """Register the server; replaces the registration of an earlier instance."""
        write_atomically(self._file(server.name), json.dumps(asdict(server)).encode())
        self._start(server.name).unlink(missing_ok=True)

    def withdraw(self, name: str) -> None:
        """Remove the server's registration, if there is one."""
        self._file(name).unlink(missing_ok=True)
        self._restart_request(name).unlink(missing_ok=True)
        self._start(name).unlink(missing_ok=True)

    def find(self, name: str) -> RegisteredServer | None:
        """Return the server of that name, if it is registered; invalid files are skipped, see `warnings`."""
        file = self._file(name)
        try:
            text = file.read_text()
            # A file that is removed while it is read may appear empty.
            server = RegisteredServer(**json.loads(text)) if text else None
            self._check(server, name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError, ServerError) as error:
            self._warn(f"The registration {file} is skipped: {str(error).splitlines()[0]}")
            return None
        return server

    def warnings(self) -> list[str]:
        """Return a sentence on each registration that was skipped, once."""
        found, self._warnings = self._warnings, []
        return found

    def key(self, server: RegisteredServer) -> Key | None:
        """Return the key for requests to the server, if it has one. Raises ServerError where it cannot be read."""
        file = server.key_file or (self.key_file if server.run else None)
        return None if file is None else read_key(file)

    def authorization(self, server: RegisteredServer) -> dict[str, str]:
        """Return the header that shows the key."""
        key = self.key(server)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _check(self, server: RegisteredServer | None, name: str) -> None:
        """Raise ValueError where another party wrote the file: only holders of the key know its fingerprint."""
        if server is None:
            return
        fields = asdict(server)
        gpu = fields.pop("first_gpu")
        if any(not isinstance(value, str) for value in fields.values()):
            raise ValueError("one of its fields is not text")
        if type(gpu) is not int or gpu < 0:
            raise ValueError("its first_gpu is not the number of a GPU")
        if server.name != name:
            raise ValueError(f"it is for the name {server.name[:40]!r}")
        if self.key_file.is_file() and server.run != fingerprint(read_key(self.key_file)):
            raise ValueError("it belongs to another run")

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._warnings.append(sentence)

    def all(self) -> list[RegisteredServer]:
        """Return all registered servers, by name."""
        found = (self.find(file.stem) for file in sorted(self.directory.glob("*.json")))
        return [server for server in found if server is not None]

    def request_restart(self, server: RegisteredServer) -> None:
        """Ask the server's supervisor to restart it, since this instance keeps failing."""
        write_atomically(self._restart_request(server.name), server.instance_id.encode())

    def requested_restart(self, name: str) -> str | None:
        """Return the `instance_id` of the server that should be restarted, if any."""
        try:
            return self._restart_request(name).read_text()
        except FileNotFoundError:
            return None

    def mark_ended(self) -> None:
        """Inform the servers' supervisor that the run has ended."""
        write_atomically(self._ended, b"")

    def ended_at(self) -> int | None:
        """Return when the run was last marked as ended (nanoseconds of that file's clock), or None."""
        try:
            return self._ended.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def clear_end(self) -> None:
        """Forget that an earlier attempt at the run has ended."""
        self._ended.unlink(missing_ok=True)

    def hold_starts(self, kind: Kind) -> None:
        """Ask the supervisors to start no servers of `kind`: the trainer uses their devices."""
        write_atomically(self._hold(kind), b"")

    def allow_starts(self, kind: Kind) -> None:
        """Let servers of `kind` start again."""
        self._hold(kind).unlink(missing_ok=True)

    def starts_held(self, kind: Kind) -> bool:
        """Return whether servers of `kind` must not start."""
        return self._hold(kind).is_file()

    def try_start(self, name: str) -> bool:
        """Return whether the server of that name may start; it then counts as starting until it is registered or
        withdrawn.
        """
        write_atomically(self._start(name), b"")
        if self.starts_held(name.rpartition("-")[0]):
            self._start(name).unlink(missing_ok=True)
            return False
        return True

    def starting_servers(self, kind: Kind) -> list[str]:
        """Return the names of the servers of `kind` that are starting."""
        return [file.stem for file in sorted(self.directory.glob(f"{kind}-*.starting"))]

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _restart_request(self, name: str) -> Path:
        return self.directory / f"{name}.restart"

    def _start(self, name: str) -> Path:
        return self.directory / f"{name}.starting"

    def _hold(self, kind: Kind) -> Path:
        return self.directory / f"{kind}.held"
