"""Threads in which replies of servers are read, so that the event loop continues meanwhile.

They are apart from those of `asyncio.to_thread`: prompts and traces queue there by the thousand, and an answer must not
wait behind them. Long replies have threads of their own: those of a policy take up to some milliseconds each, and a
judge's answers, which take less than one, would wait for all that came before them.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LONG_REPLY = 2**18
"""Bytes from which on a reply is a long one: more than a judge's answers about a trace, less than a group of traces, or
than a trace of 16,000 tokens from a server without our plugins."""
_SHORT, _LONG = ThreadPoolExecutor(2, "replies"), ThreadPoolExecutor(2, "long-replies")


async def in_reply_thread[T](work: Callable[..., T], *arguments: Any, size: int = 0) -> T:
    """Run `work(*arguments)` in a thread for replies and return its result; `size`: bytes of the reply."""
    threads = _LONG if size >= LONG_REPLY else _SHORT
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)
