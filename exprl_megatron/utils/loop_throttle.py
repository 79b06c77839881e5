"""Spreads callers that are ready in the same pass of an event loop over several passes."""

import asyncio
import time
from collections import deque
from collections.abc import Callable


class LoopThrottle:
    """Lets at most `most` callers continue in each pass of the event loop, and the others in later passes, in order.

    Between two passes the loop does everything else that has become ready, so that none of it waits for all callers.
    Where a pass takes longer than `pass_s` seconds, by `clock`, fewer continue in the next one, but at least one.
    """

    def __init__(self, most: int, pass_s: float = float("inf"), clock: Callable[[], float] = time.monotonic):
        self._most, self._pass_s, self._clock = most, pass_s, clock
        self._each_pass = self._left = most
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._scheduled_at: float | None = None

    async def take(self) -> None:
        """Return in this pass or a later one."""
        loop = asyncio.get_running_loop()
        if self._scheduled_at is None:
            self._schedule(loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled_at = self._clock()
        loop.call_soon(self._next_pass, loop)

    def _next_pass(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._scheduled_at is not None and self._clock() - self._scheduled_at > self._pass_s:
            self._each_pass = max(1, self._each_pass // 2)
        else:
            self._each_pass = min(self._most, self._each_pass + 1)
        self._left = self._each_pass
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._left -= 1
        self._scheduled_at = None
        if self._left < self._each_pass:
            self._schedule(loop)
