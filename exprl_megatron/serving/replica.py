"""One server of a pool: its state, and the actions that release and resume its memory."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal

from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.registry import RegisteredServer

SLEEPING = ("kv_cache", "weights")
"""SGLang's tags of the memory that a sleeping server releases, in the order of release."""
type Action = Callable[[SGLangClient], Coroutine[Any, Any, None]]
"""A request that a server must carry out."""


class Replica:
    """One start of a server, with its client and its state in the pool."""

    def __init__(self, server: RegisteredServer, deadline_s: float, headers: Mapping[str, str]):
        self.server = server
        self.client = SGLangClient(server.url, server.name, Path(server.log_file), deadline_s, headers)
        self.client.first_gpu = server.first_gpu
        self.state: Literal["pending", "healthy", "unhealthy"] = "unhealthy"
        self.failures = 0
        """Failures in a row."""
        self.next_try = 0.0
        """When an unhealthy server is probed again, in the event loop's time."""
        self.running: set[asyncio.Task] = set()
        self.asleep: set[str] = set()
        """Tags of the memory that it has released (SLEEPING)."""

    def release(self) -> None:
        """Cancel the requests in flight, so that their callers send them to another server."""
        for task in self.running:
            task.cancel()


def sleep_action(replica: Replica, tags: Collection[str]) -> Action:
    """Release the memory of `tags`, where it is held: SGLang crashes if memory is released twice."""
    released = [tag for tag in SLEEPING if tag in tags and tag not in replica.asleep]

    async def sleep(client: SGLangClient) -> None:
        await client.sleep(released)
        replica.asleep.update(released)

    return sleep


def wake_action(replica: Replica, tag: str) -> Action:
    """Resume the memory of `tag`."""

    async def wake(client: SGLangClient) -> None:
        await client.wake([tag])
        replica.asleep.discard(tag)

    return wake
