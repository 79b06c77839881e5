"""A child process that was forked, or adopted from the process that forked it."""

import ctypes
import os
import signal
import subprocess
import time
from typing import Protocol

_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


class Child(Protocol):
    """The interface of subprocess.Popen and ForkedChild."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit status, negative where a signal ended it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status at the end. Raises subprocess.TimeoutExpired after `timeout` seconds."""

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""

    def terminate(self) -> None:
        """Send it SIGTERM."""

    def kill(self) -> None:
        """Send it SIGKILL."""


class ForkedChild:
    """A Child that was forked by a fork server; `pid` is a child of this process."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative where a signal ended it; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status at the end.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        if timeout is None and self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        started = time.monotonic()
        while (status := self.poll()) is None:
            if timeout is not None and time.monotonic() >= started + timeout:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when `parent` ends; end it immediately if `parent` has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
