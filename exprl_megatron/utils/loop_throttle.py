"""Many callers that would all be ready in the same pass of an event loop, spread over several."""

import asyncio
from collections import deque


class LoopThrottle:
    """Lets so many callers continue in each pass of the event loop; the others continue in later passes, in order.

    Between two passes the loop does everything else that has become ready, so that none of it waits for all callers.
    """

    def __init__(self, each_pass: int):
        self._each_pass = self._left = each_pass
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    async def take(self) -> None:
        """Return in this pass or a later one."""
        loop = asyncio.get_running_loop()
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._next_pass, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_pass(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._each_pass
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._left -= 1
        self._scheduled = self._left < self._each_pass
        if self._scheduled:
            loop.call_soon(self._next_pass, loop)
