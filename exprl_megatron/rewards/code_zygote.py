"""The zygote: the process from which every program is forked. It never sees a request or an output.

A forked process can read all memory of its parent, including freed memory. The worker's memory has the output of
earlier programs; the zygote is forked from it before the first request and only passes file descriptors on, so that
every program starts with the same memory.
"""

import errno
import os
import select
import socket
import struct
from collections.abc import Callable

from exprl_megatron.processes.child import die_with_parent

_MAX_FDS = 16
_PID = struct.Struct("=q")
"""The identifier of a new process, or the negative errno of the fork that failed."""
_END = struct.Struct("=qd")
"""Wait status and CPU seconds of an ended process."""
_START, _ENDED, _REAP = b"s", b"e", b"r"


class ZygoteDied(Exception):
    """The zygote has ended; the worker cannot run programs without it."""


class Zygote:
    """Forks a zygote from this process, which must have a single thread.

    Args:
        begin: runs in each process that the zygote forks; takes the file descriptors that were sent to it, and returns
            the exit status.
    """

    def __init__(self, begin: Callable[[list[int]], int]):
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker = os.getpid()
        if os.fork() == 0:
            try:
                self._channel.close()
                _serve(worker, theirs, begin)
            finally:
                os._exit(1)
        theirs.close()

    def start(self, fds: list[int]) -> int:
        """Fork a process that gets `fds`; returns its identifier.

        Raises:
            OSError: the fork failed.
            ZygoteDied: the zygote has ended.
        """
        try:
            socket.send_fds(self._channel, [_START], fds)
        except BrokenPipeError as error:
            raise ZygoteDied("the process that programs are forked from died") from error
        (pid,) = _PID.unpack(self._receive())
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid

    def ended(self, within_s: float) -> bool:
        """Return whether the started process ends within `within_s` seconds. It stays a zombie, which keeps its
        identifier.
        """
        return bool(select.select([self._channel], [], [], max(0.0, within_s))[0])

    def reap(self) -> tuple[int, float]:
        """Wait for the end of the started process; returns its wait status and CPU time in seconds.

        Raises:
            ZygoteDied: the zygote has ended.
        """
        self._receive()
        self._channel.send(_REAP)
        return _END.unpack(self._receive())

    def _receive(self) -> bytes:
        message = self._channel.recv(_END.size)
        if not message:
            raise ZygoteDied("the process that programs are forked from died")
        return message


def _serve(worker: int, channel: socket.socket, begin: Callable[[list[int]], int]) -> None:
    """Fork one process after another, until the worker ends."""
    die_with_parent(worker)
    for fd in (0, 1):  # these are for the worker's requests and replies
        os.close(fd)
    while True:
        message, fds, _, _ = socket.recv_fds(channel, len(_START), _MAX_FDS)
        if not message:
            return
        try:
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            status = 1
            try:
                status = begin(fds)
            finally:
                os._exit(status)
        for fd in fds:
            os.close(fd)
        channel.send(_PID.pack(pid))
        if pid > 0:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            channel.send(_ENDED)
            channel.recv(len(_REAP))
            _, status, usage = os.wait4(pid, 0)
            channel.send(_END.pack(status, usage.ru_utime + usage.ru_stime))
