"""Concurrent calls that succeed or fail as one."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any


async def gather_or_cancel[T](calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all `calls` concurrently and return their results in the order of the calls.

    The first failure cancels all other calls and is raised unchanged.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in running]


async def first_n[T](
    calls: Iterable[Coroutine[Any, Any, T]], n: int, accept_fn: Callable[[T], bool] = lambda result: True
) -> list[T]:
    """Await `calls` concurrently until `n` results are accepted by `accept_fn`, then cancel the calls that are left.

    Returns the results of all calls that were finished by then, accepted or not, in the order of the calls; all results
    where fewer than `n` are accepted. The first failure before that cancels all other calls and is raised unchanged.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(call) for call in calls]
            for finished in asyncio.as_completed(running):
                n -= accept_fn(await finished)
                if n == 0:
                    break
            for task in running:
                task.cancel()
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in running if not task.cancelled()]


def _first(failures: BaseExceptionGroup) -> BaseException:
    """Return the first exception of a group, however deep it is nested."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
