"""The lag of the coordinator's event loop, as a metric of every step.

While the loop is busy, requests, judge deadlines and health checks wait. Long work is done in a few threads: each may
hold the interpreter's lock for some milliseconds.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

INTERVAL_S = 0.01
"""Seconds between two measurements, and the precision of a stall. A measurement takes some microseconds."""
HOST_THREADS = max(4, min(8, (os.cpu_count() or 2) // 2))
"""Threads for work that must not block the event loop: prompts, tokens, segments, files."""
SWITCH_S = 0.001
"""Seconds for which a thread keeps the interpreter's lock while others wait for it; Python's default is 0.005. The loop
waits for each of the other threads in turn, at every call of the kernel."""


class LoopLag:
    """Measures the lag of the event loop in which it is started."""

    def __init__(self) -> None:
        self._longest_s = 0.0
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        """Start measuring, and bound the threads of `asyncio.to_thread` and their turns; call it in the loop."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(HOST_THREADS, "host-work"))
        sys.setswitchinterval(SWITCH_S)
        self._task = loop.create_task(self._watch())

    def stop(self) -> None:
        """Stop measuring."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def take(self) -> float:
        """Return the longest lag in seconds since the last call; may be called from any thread."""
        longest, self._longest_s = self._longest_s, 0.0
        return longest

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._longest_s = max(self._longest_s, loop.time() - due)
