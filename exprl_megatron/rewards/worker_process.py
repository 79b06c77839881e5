"""A child process that answers requests, one JSON object per line, each within a deadline.

Why neither `concurrent.futures.ProcessPoolExecutor` nor pebble: the first cannot kill a worker that hangs in C code, so
a hostile answer would occupy it for ever; both fork or spawn this process's modules, while the sandbox's worker needs
a Python that has loaded nothing of the trainer and has no environment (code_sandbox.py).
"""

import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence

_PIECE = 2**16


class WorkerProcess:
    """Starts `command`, whose first line of output means that it is ready; each further line is a reply.

    Args:
        command: program and arguments.
        env: environment variables; None: those of this process.
        cwd: working directory; None: that of this process.
        new_session: whether the process gets a new session, which signals of this terminal do not reach.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        new_session: bool = False,
    ):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=env,
            cwd=cwd,
            start_new_session=new_session,
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        self._requests, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)
        self._unread = bytearray()
        self._greeting: dict | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def wait_until_ready(self, deadline_s: float) -> dict:
        """Wait at most `deadline_s` seconds for the first line of the process, and return it.

        Raises:
            RuntimeError: there is no line in time; the process is killed.
        """
        if self._greeting is None:
            try:
                self._greeting = self._reply(time.monotonic() + deadline_s)
            except (TimeoutError, EOFError) as error:
                self.kill()
                raise RuntimeError(f"the answer verifier's process did not start: {error}") from error
        return self._greeting

    def ask(self, request: dict, deadline_s: float) -> dict:
        """Send `request`, and return the reply.

        Raises:
            TimeoutError: there is no reply within `deadline_s` seconds.
            EOFError: the process died.
        """
        end = time.monotonic() + deadline_s
        pipe = self._requests.fileno()
        unsent = memoryview(json.dumps(request).encode() + b"\n")
        while unsent:
            if not select.select([], [pipe], [], max(0.0, end - time.monotonic()))[1]:
                raise TimeoutError("the request was not read in time")
            try:
                unsent = unsent[os.write(pipe, unsent[:_PIECE]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise EOFError("the verifier's process died") from error
        return self._reply(end)

    def kill(self) -> None:
        """Kill the process, and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._replies.close()

    def _reply(self, end: float) -> dict:
        pipe = self._replies.fileno()
        newline = self._unread.find(b"\n")
        while newline < 0:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("no reply in time")
            piece = os.read(pipe, _PIECE)
            if not piece:
                raise EOFError("the verifier's process died")
            if b"\n" in piece:
                newline = len(self._unread) + piece.index(b"\n")
            self._unread += piece
        line = bytes(self._unread[:newline])
        del self._unread[: newline + 1]
        return json.loads(line)
