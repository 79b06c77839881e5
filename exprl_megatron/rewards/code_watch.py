"""Supervision of one sandboxed program until its end."""

import contextlib
import os
import select
import signal
import socket
import time

from exprl_megatron.rewards import seccomp
from exprl_megatron.rewards.code_zygote import Zygote
from exprl_megatron.rewards.containment import Limits

CONTAINED = b"contained"
"""The message of a forked process when every layer is active, before any part of the program runs."""
THREADS = b"threads"
"""The message that carries the file descriptor at which new threads wait."""

_REQUESTS = 0
_PIECE = 2**16
_ERROR_BYTES = 4096
_LEAST_SHARE = 0.5
"""Share of its CPU limit that a program has used at least where the kernel kills it for the limit: the kernel charges
whole ticks, on a busy machine more of them than the program used (a tenth more at five processes a core)."""


class Watch:
    """Watches one program until its end, and kills it where it exceeds its limits.

    Args:
        pid: identifier of the program's process.
        zygote: its parent.
        control: the socket of the process for messages of containment and threads.
        pipes: file descriptors of standard output, standard error and the result.
        end: deadline in seconds of `time.monotonic`.
        limits: limits of the program.
    """

    def __init__(self, pid: int, zygote: Zygote, control: socket.socket, pipes: list[int], end: float, limits: Limits):
        self._pid = pid
        self._zygote = zygote
        self._control = control
        self._end = end
        self._limits = limits
        self._output, self._errors, self._result = pipes
        self._read = {fd: bytearray() for fd in pipes}
        self._open = {*pipes, control.fileno(), _REQUESTS}
        self._size = 0
        self._threads = 0
        self._listener: int | None = None
        self._message = b""
        self._overran: str | None = None

    def reply(self, of_call: bool) -> dict:
        """Wait for the end of the program, and return the worker's reply (see code_worker.py)."""
        try:
            followed = {*self._read, self._control.fileno()}
            while self._overran is None and self._open & followed:
                self._handle_next_event()
            status, cpu_s = self._wait()
        finally:
            if self._listener is not None:
                os.close(self._listener)
        if self._message != CONTAINED:
            return {"failure": f"the program was not contained: {self._message.decode(errors='replace') or status}"}
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if self._overran is None and killed:
            if cpu_s < _LEAST_SHARE * self._limits.cpu_s:
                return {"failure": "the program was killed from outside"}
            self._overran = "time"
        ending = self._overran or ("finished" if status == 0 else "failed")
        error = self._read[self._errors].decode(errors="replace")
        if os.WIFSIGNALED(status) and ending == "failed":
            error = f"{error}\nended by {signal.Signals(os.WTERMSIG(status)).name}"
        value = self._read[self._result if of_call else self._output]
        return {"ending": ending, "output": value.decode(errors="replace"), "error": error}

    def _handle_next_event(self) -> None:
        """Wait for the next event and handle it."""
        left = self._end - time.monotonic()
        if left <= 0:
            self._overran = "time"
            return
        poll = select.poll()
        for fd in self._open:
            poll.register(fd, select.POLLIN)
        for fd, event in poll.poll(1000 * left):
            if fd == _REQUESTS:
                # No request arrives while a program runs, so this is the end of the client's process.
                os.kill(self._pid, signal.SIGKILL)
                os._exit(0)
            elif fd == self._control.fileno():
                self._listen()
            elif fd == self._listener:
                self._count(fd, event)
            else:
                self._collect(fd)

    def _listen(self) -> None:
        message, fds, _, _ = socket.recv_fds(self._control, _PIECE, 1)
        if fds:
            self._listener = fds[0]
            self._open.add(self._listener)
        elif message:
            self._message = message
        else:
            self._open.discard(self._control.fileno())

    def _count(self, listener: int, event: int) -> None:
        if not event & select.POLLIN:
            self._open.discard(listener)
            return
        # The waiting thread may have ended with its process.
        with contextlib.suppress(OSError):
            seccomp.decide_thread(listener, allow=self._threads < self._limits.threads)
        self._threads += 1

    def _collect(self, fd: int) -> None:
        piece = os.read(fd, _PIECE)
        if not piece:
            self._open.discard(fd)
        self._size += len(piece)
        if self._size > self._limits.output_bytes:
            self._overran = "output"
        self._read[fd] += piece
        if fd == self._errors:
            del self._read[fd][:-_ERROR_BYTES]

    def _wait(self) -> tuple[int, float]:
        """Return status and CPU seconds of the process, which may run until the deadline after it closed its pipes."""
        if self._overran is None and not self._zygote.ended(self._end - time.monotonic()):
            self._overran = "time"
        if self._overran is not None:
            os.kill(self._pid, signal.SIGKILL)
        return self._zygote.reap()
