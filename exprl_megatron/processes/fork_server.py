"""The launcher's side of a fork server: a process that imports libraries once and forks the processes that need them.

A server or a rank spends ten CPU seconds on imports. Forked processes share that time, and the memory of the libraries.
A process that has initialized CUDA must not fork, so this is used on a CPU only (see fork_process.py).

Why not multiprocessing's forkserver: its processes run a pickled function and end with their parent's connection, while
servers and ranks are programs with their own command line, log, session and supervisor.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exprl_megatron.processes.child import ForkedChild

PR_SET_CHILD_SUBREAPER = 36
LENGTH_BYTES = 4


def current_umask() -> int:
    """Return this process's umask, which os.umask reads only by changing it for all threads."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)


@dataclass(frozen=True)
class ForkRequest:
    """A process to fork. Its standard output, standard error and the inherited descriptors are sent separately."""

    command: list[str]
    """`[sys.executable, "-m", MODULE, arguments...]`."""
    environment: dict[str, str]
    grace_s: float | None
    """Seconds from SIGTERM to SIGKILL of the supervised process; None: it is not supervised."""
    name: str
    """Name at the end of the process title, as in `trainer-0`."""
    inherited: list[str] = field(default_factory=list)
    """Environment variables that are to hold the numbers of the inherited descriptors."""
    umask: int = field(default_factory=current_umask)
    """The launcher's when it starts the process; the fork server has that of its own start."""


class ForkServer:
    """Starts to import immediately; `start` waits for it. `programs` are the modules whose processes it can fork."""

    def __init__(self, preload: str, programs: Collection[str], environment: Mapping[str, str], deadline_s: float):
        self.programs = frozenset(programs)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open until `close`
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(deadline_s)
        command = [
            sys.executable,
            "-m",
            "exprl_megatron.processes.fork_process",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        with theirs:
            self._process: subprocess.Popen | None = subprocess.Popen(
                [*command, preload],
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )

    def start(self, request: ForkRequest, descriptors: list[int]) -> ForkedChild | None:
        """Fork a new child of this process; None where the fork server failed, which is printed on stderr once."""
        if self._process is None:
            return None
        body = json.dumps(asdict(request)).encode()
        try:
            # The forked process becomes the child of its nearest ancestor that adopts: this process.
            _adopt(True)
            socket.send_fds(self._channel, [len(body).to_bytes(LENGTH_BYTES)], descriptors)
            self._channel.sendall(body)
            reply = self._channel.recv(LENGTH_BYTES, socket.MSG_WAITALL)
        except OSError as error:
            self._give_up(str(error))
            return None
        finally:
            _adopt(False)
        if len(reply) != LENGTH_BYTES:
            self._give_up("it ended")
            return None
        return ForkedChild(int.from_bytes(reply))

    def close(self) -> None:
        """End the fork server; the processes that it forked continue."""
        self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._log.close()

    def _give_up(self, reason: str) -> None:
        """Print the cause, with the end of the process's output, and fork no more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or [reason]
        print(f"exprl: the fork server of {', '.join(sorted(self.programs))} failed ({last[0]}).", file=sys.stderr)


def _adopt(wanted: bool) -> None:
    """Set whether descendants of this process whose parent ends become its children."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
