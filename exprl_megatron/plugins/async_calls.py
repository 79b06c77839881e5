"""Runs async functions of the user in an event loop of their own, which they cannot block for the rest of the run."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""The loop by process id: a forked child has no thread of its parent."""


def contained(error: BaseException) -> RuntimeError:
    """Return an exception that does not end the process, with the traceback of `error`, such as SystemExit."""
    return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)


async def in_plugin_loop(call: Callable[[], Awaitable[Any]]) -> Any:
    """Return what awaiting `call()` returns, in the event loop of the user's functions.

    All of them share one loop in a process, so that they can share sessions and locks.

    Raises:
        Exception: what `call` raises; of other exceptions see `contained`.
        asyncio.CancelledError: the caller is canceled.
    """

    async def guarded() -> Any:
        try:
            return await call()
        except Exception:
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            raise contained(error) from None

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(guarded(), _plugin_loop()))


def _plugin_loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if (loop := _loops.get(os.getpid())) is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=_run, args=(loop,), name="async-plugins", daemon=True).start()
        return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except BaseException:  # A task that the user's code started raised SystemExit: its own awaiter gets it too.
            continue
