"""Threads in which replies of servers are read, so that the event loop continues meanwhile.

They are apart from those of `asyncio.to_thread`: prompts and traces queue there by the thousand, and an answer must not
wait behind them.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_THREADS = ThreadPoolExecutor(2, "replies")


async def in_reply_thread[T](work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns or raises."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)
