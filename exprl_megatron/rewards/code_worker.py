"""A process that runs contained programs and supervises them; it reads and writes JSON lines.

It has loaded every module in advance, so that a program starts in milliseconds and never opens a file. It gets programs
and inputs, and never the expected outputs. Programs are forked from its zygote, which gets none of these.
Its first line is {"layers": names}, or {"refused": reason} where it cannot contain programs on this machine.
A request is {"program", "input", "function", "wall_s", "limits"}; the reply is {"ending": "finished" | "failed" |
"time" | "output", "output", "error"}, or {"failure": text} where the program could not run and is not the cause.
The process exits at the end of its input.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
import sys
import time
from dataclasses import asdict

from exprl_megatron.rewards import code_program, containment, seccomp
from exprl_megatron.rewards.code_watch import CONTAINED, THREADS, Watch
from exprl_megatron.rewards.code_zygote import Zygote, ZygoteDied
from exprl_megatron.rewards.containment import DEFAULT_LIMITS, Limits

_REQUESTS, _REPLIES = 0, 1
_CONTROL, _TASK = 4, 5
_FIRST_FREE = 6
_ASIDE = containment.OPEN_FILES // 2

_ATTEMPTS = """
import os, socket
attempts = {
    "open files": lambda: os.open("/", os.O_RDONLY),
    "use the network": socket.socket,
    "start processes": os.fork,
    "send signals": lambda: os.kill(os.getppid(), 0),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except PermissionError:
        continue
    print(name, flush=True)
"""


class Sandbox:
    """Runs programs, each in a forked and contained process."""

    def __init__(self, optional_layers: bool, modules: tuple[str, ...]):
        code_program.load_modules(modules)
        self._names = code_program.prelude()
        self._landlock = optional_layers and containment.landlock_version() > 0
        self._optional_layers = optional_layers
        self._zygote: Zygote | None = None
        self.layers: list[str] = []

    def contain_worker(self) -> str | None:
        """Drop the rights that the worker does not need, and test a program; returns a reason if that fails."""
        if not seccomp.is_supported():
            return f"there is no seccomp filter for {sys.platform} on {os.uname().machine}"
        containment.limit_worker()
        layers = containment.drop_machine_access() if self._optional_layers else []
        os.environ.clear()
        self._zygote = Zygote(self._begin)
        tried = self.run(_ATTEMPTS, None, "", 30.0, DEFAULT_LIMITS)
        if "failure" in tried or tried["ending"] != "finished" or tried["error"]:
            return f"a harmless program did not run: {tried}"
        if tried["output"]:
            return f"a contained program could {' and '.join(tried['output'].splitlines())}"
        counted = self.run("import threading; threading.Thread(target=int).start()", None, "", 30.0, DEFAULT_LIMITS)
        threads = "threads counted" if counted["ending"] == "finished" and not counted["error"] else "no threads"
        landlock = [f"Landlock {containment.landlock_version()}"] if self._landlock else []
        self.layers = ["seccomp", threads, *landlock, *layers]
        return None

    def run(self, program: str, function: str | None, text: str, wall_s: float, limits: Limits) -> dict:
        """Run one program, and return the reply to its request (see the top of this file).

        Raises:
            OSError: a process or a pipe cannot be made.
            ZygoteDied: the zygote has ended.
        """
        deadline = time.monotonic() + wall_s
        task = json.dumps({"program": program, "function": function, "input": text, "limits": asdict(limits)})
        with contextlib.ExitStack() as opened:
            source = opened.enter_context(_memory_file(b"" if function else text.encode()))
            task_file = opened.enter_context(_memory_file(task.encode()))
            pipes = [[opened.enter_context(end) for end in _pipe()] for _ in range(3)]
            control, theirs = map(opened.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            ends: list[io.FileIO | socket.socket] = [source, *(writer for _, writer in pipes), theirs, task_file]
            assert self._zygote is not None, "contain_worker starts the zygote"
            pid = self._zygote.start([end.fileno() for end in ends])
            for end in ends:
                end.close()
            watch = Watch(pid, self._zygote, control, [reader.fileno() for reader, _ in pipes], deadline, limits)
            return watch.reply(of_call=function is not None)

    def _begin(self, fds: list[int]) -> int:
        """Run the task in the file of the last of `fds`, in a process forked for it; returns the exit status."""
        zygote = os.getppid()
        _arrange(*fds)
        with open(_TASK, "rb") as task_file:
            task = json.loads(task_file.read())
        self._contain(zygote, Limits(**task["limits"]))
        return code_program.run(task["program"], task["function"], task["input"], self._names)

    def _contain(self, zygote: int, limits: Limits) -> None:
        """Contain this forked process, report that over the control socket, and close the socket."""
        try:
            containment.contain_program(zygote, limits)
            if self._landlock:
                containment.deny_with_landlock()
            listener = seccomp.notify_threads()
            if listener is not None:
                with socket.socket(fileno=os.dup(_CONTROL)) as control:
                    socket.send_fds(control, [THREADS], [listener])
                os.close(listener)
            seccomp.install_filter(threads=listener is not None)
            os.write(_CONTROL, CONTAINED)
            os.close(_CONTROL)
        except BaseException as error:
            os.write(_CONTROL, f"{type(error).__name__}: {error}".encode())
            os._exit(1)


def _arrange(*fds: int) -> None:
    """Put `fds` at 0, 1, 2, ... and close everything else."""
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, _ASIDE) for fd in fds]
    for place, fd in enumerate(aside):
        os.dup2(fd, place)
    os.closerange(_FIRST_FREE, containment.OPEN_FILES)


def _memory_file(content: bytes) -> io.FileIO:
    """Return an open file without a name, positioned at its start."""
    fd = os.memfd_create("input")
    _write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return os.fdopen(fd, "rb", buffering=0)


def _pipe() -> tuple[io.FileIO, io.FileIO]:
    reader, writer = os.pipe()
    return open(reader, "rb", buffering=0), open(writer, "wb", buffering=0)


def _write(fd: int, content: bytes) -> None:
    unwritten = memoryview(content)
    while unwritten:
        unwritten = unwritten[os.write(fd, unwritten) :]


def serve(optional_layers: bool, modules: tuple[str, ...]) -> None:
    """Answer requests from standard input until it ends."""
    sandbox = Sandbox(optional_layers, modules)
    refused = sandbox.contain_worker()
    _reply({"layers": sandbox.layers} if refused is None else {"refused": refused})
    with open(_REQUESTS, "rb", closefd=False) as requests:
        while refused is None and (line := requests.readline()):
            task = json.loads(line)
            limits = Limits(**task["limits"])
            try:
                reply = sandbox.run(task["program"], task["function"], task["input"], task["wall_s"], limits)
            except (OSError, UnicodeEncodeError) as error:
                reply = {"failure": f"{type(error).__name__}: {error}"}
            except ZygoteDied as error:
                # No reply: the end of this worker makes the client replace it.
                sys.exit(f"code sandbox: {error}")
            _reply(reply)


def _reply(reply: dict) -> None:
    _write(_REPLIES, json.dumps(reply).encode() + b"\n")
