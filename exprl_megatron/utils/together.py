"""Many calls under way at once, which succeed or fail as one."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any


async def together[T](calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all `calls`, in their order.

    The first failure cancels everything else and is raised as it is.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in running]


async def first_of[T](
    calls: Iterable[Coroutine[Any, Any, T]], wanted: int, counts: Callable[[T], bool] = lambda result: True
) -> list[T]:
    """The results of those `calls` that were through when `wanted` results counted, in the order of the calls.

    The others are cancelled then. All results, fewer than wanted, where not as many count. The first failure before
    that cancels everything else and is raised as it is.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(call) for call in calls]
            for finished in asyncio.as_completed(running):
                wanted -= counts(await finished)
                if wanted == 0:
                    break
            for task in running:
                task.cancel()
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    return [task.result() for task in running if not task.cancelled()]


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The first exception, however deep it lies."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
