"""Supervises one child process: stops it, and all that it started, when the parent has ended.

Run as a script with the standard library alone: `supervise.py PARENT_PID GRACE_S COMMAND...`. It reads its
own parent's pid five times a second, so that kill -9 of the parent is enough; SIGTERM to it stops the server.

Why not PR_SET_PDEATHSIG alone, or a process manager: the signal reaches one process and not the children that a server
starts in other sessions, and a manager would have to be installed on every node.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exprl_megatron.processes.child import Child

HEARTBEAT = "EXPRL_HEARTBEAT"
"""Environment variable with the number of a descriptor that the command inherits."""
_POLL_S = 0.2
_LOOK_S = 5.0
_SHARED = "/dev/shm/sgl"
_PR_SET_PDEATHSIG = 1


def supervised_command(command: list[str], grace_s: float = 5.0, parent: int | None = None) -> list[str]:
    """Return the command that runs `command` supervised, for this process to start; from SIGTERM to SIGKILL are
    `grace_s`.
    """
    return [sys.executable, "-E", "-S", __file__, str(parent or os.getpid()), str(grace_s), *command]


def supervise(parent: int, grace_s: float, start: Callable[[dict[str, str]], "Child"]) -> int:
    """Run what `start` starts with these environment variables to its end, to our SIGTERM, or to the end of `parent`.

    It must be killed when this process ends. Returns its exit status, negative where a signal ended it.
    """
    # Slurm sends SIGUSR1 to every process of a step, ahead of its time limit; only the launcher is meant, and what
    # ignores it here is ignored by the server and all that it starts.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # The same holds for Ctrl-C, which a terminal sends to all processes of a command.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked_to_stop: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    # SGLang leaves its sockets in the temporary directory; their paths must be short, so it is not in the run's.
    directory = tempfile.mkdtemp(prefix="exprl-")
    try:
        # The server's children watch the server; the server watches us, should we be killed ourselves.
        server = start({"TMPDIR": directory})
        shared: set[str] = set()
        look_at = 0.0
        while server.poll() is None and not asked_to_stop and os.getppid() == parent:
            if time.monotonic() >= look_at:
                shared |= _shared_memory(server.pid)
                look_at = time.monotonic() + _LOOK_S
            time.sleep(_POLL_S)
        shared |= _shared_memory(server.pid)
        if grace_s > 0 and server.poll() is None:
            server.terminate()
            _wait(server, grace_s)
        _kill_group(server.pid)
        status = server.wait()
        for path in shared:
            # SGLang's processes are killed, and leave it behind.
            Path(path).unlink(missing_ok=True)
        return status
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def start_by_exec(command: list[str]) -> Callable[[dict[str, str]], subprocess.Popen]:
    """Start `command` with further environment variables, in its own session, to be killed when this process ends."""
    libc = ctypes.CDLL(None)
    return lambda environment: subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
        pass_fds=[int(file)] if (file := os.environ.get(HEARTBEAT)) else [],
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )


def shell_status(status: int) -> int:
    """Return the exit status in a shell's convention: 128 + the signal that ended the command."""
    return status if status >= 0 else 128 - status


def _wait(server: "Child", seconds: float) -> None:
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"supervise: SIGKILL, {seconds:g} s after SIGTERM", file=sys.stderr)


def _shared_memory(pid: int) -> set[str]:
    """Return the files of SGLang in shared memory that the process and its children have in use."""
    found: set[str] = set()
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        # It has ended.
        return found
    # address, rights, offset, device, inode, path
    paths = (line.split(maxsplit=5)[5] for line in lines if _SHARED in line)
    found |= {path for path in paths if path.startswith(_SHARED) and not path.endswith(" (deleted)")}
    for child in children:
        found |= _shared_memory(int(child))
    return found


def _kill_group(group: int) -> None:
    """Kill (SIGKILL) the rest of the server's process group: children whose parent died before they watched it."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(shell_status(supervise(int(sys.argv[1]), float(sys.argv[2]), start_by_exec(sys.argv[3:]))))
