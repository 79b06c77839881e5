"""Pipelining of a sync's rounds on rank 0: the next bucket is gathered while the previous one is sent."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator

type Gather[T] = Callable[[int], T]
"""Rank 0's part in gathering round `number`; runs on a thread."""
type Send[T] = Callable[[int, T], Coroutine]
"""Sends round `number`, with what was gathered of it, to all servers."""


async def push_rounds[T](
    count: int,
    coordinator: RankCoordinator,
    clients: Sequence[SGLangClient],
    gather: Gather[T],
    send: Send[T],
    deadline_s: float,
) -> None:
    """Begin a weight update on all servers, send `count` rounds and end it; each server answers within `deadline_s`.

    A round is gathered only after the servers have received the one before the last: at most two buckets exist on a
    rank. The other ranks follow with a RankCoordinator.wait_signal before each round and one at the end.
    """
    with coordinator.abort_on_error():
        await gather_or_cancel(client.begin_weight_update(deadline_s=deadline_s) for client in clients)
        await send_rounds(count, coordinator, gather, send)
        await gather_or_cancel(client.end_weight_update(deadline_s=deadline_s) for client in clients)
        coordinator.signal()


async def send_rounds[T](count: int, coordinator: RankCoordinator, gather: Gather[T], send: Send[T]) -> None:
    """Send the rounds only; see push_rounds."""
    loop = asyncio.get_running_loop()
    sending: asyncio.Task | None = None
    try:
        for number in range(count):
            coordinator.signal()
            gathered = await loop.run_in_executor(None, gather, number)
            if sending is not None:
                await sending
            sending = asyncio.create_task(send(number, gathered))
        if sending is not None:
            await sending
    finally:
        if sending is not None:
            sending.cancel()
