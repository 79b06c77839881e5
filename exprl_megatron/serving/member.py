"""One server of a fleet: its place in it, and what it can be asked to do with its memory."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal

from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.registry import RegisteredServer

SLEEPING = ("kv_cache", "weights")
"""What a server gives up, as SGLang names it."""
type Order = Callable[[SGLangClient], Coroutine[Any, Any, None]]
"""What a server is asked to do."""


class Member:
    """One incarnation of a server, and its place in the fleet."""

    def __init__(self, server: RegisteredServer, deadline_s: float, headers: Mapping[str, str]):
        self.server = server
        self.client = SGLangClient(server.url, server.name, Path(server.log_file), deadline_s, headers)
        self.client.first_gpu = server.first_gpu
        self.state: Literal["joining", "serving", "out"] = "out"
        self.failures = 0
        """In a row."""
        self.next_try = 0.0
        """When it may be tried again, in the event loop's time, while it is out."""
        self.running: set[asyncio.Task] = set()
        self.asleep: set[str] = set()
        """What of its memory it has given up (SLEEPING)."""

    def release(self) -> None:
        """Let callers that wait for this server's answers ask another one."""
        for task in self.running:
            task.cancel()


def to_sleep(member: Member, tags: Collection[str]) -> Order:
    """Give the memory of `tags` up, as far as it has it: SGLang dies where memory is given up twice."""
    given_up = [tag for tag in SLEEPING if tag in tags and tag not in member.asleep]

    async def sleep(client: SGLangClient) -> None:
        await client.sleep(given_up)
        member.asleep.update(given_up)

    return sleep


def to_wake(member: Member, tag: str) -> Order:
    """Take that of `tag` again."""

    async def wake(client: SGLangClient) -> None:
        await client.wake([tag])
        member.asleep.discard(tag)

    return wake
