"""Many calls under way at once, which succeed or fail as one."""

import asyncio
from collections.abc import Coroutine, Iterable
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


def _first(failures: BaseExceptionGroup) -> BaseException:
    """The first exception, however deep it lies."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
