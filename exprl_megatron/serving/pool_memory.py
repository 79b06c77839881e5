"""Bookkeeping of the GPU memory that the servers of a pool have released; no server starts while they sleep.

A server allocates a share of its GPU's free memory when it starts (SGLang: `--mem-fraction-static`), and the trainer
allocates what it needs when it trains. So no server starts while the trainer trains on its GPU, and the trainer
allocates nothing while a server starts there. Each side writes this to the registry before it reads what the other side
wrote.
"""

import asyncio

from exprl_megatron.serving.registry import Kind, Registry
from exprl_megatron.serving.replica import SLEEPING, Action, Replica, sleep_action, wake_action


class PoolMemory:
    """Memory of the servers of `kind` in `registry`."""

    def __init__(self, registry: Registry, kind: Kind):
        self._registry = registry
        self._kind = kind
        self._released: set[str] = set()
        """The tags of SLEEPING whose memory each server should have released."""

    def sleep(self) -> None:
        """Request that all servers sleep, and that none starts."""
        self._released = set(SLEEPING)
        self._registry.hold_starts(self._kind)

    def wake(self, tag: str) -> None:
        """Request that all servers resume the memory of `tag`."""
        self._released.discard(tag)

    @property
    def awake(self) -> bool:
        """Whether servers should hold all their memory."""
        return not self._released

    def allow_starts(self) -> bool:
        """Allow servers to start; returns whether they were not allowed to before."""
        held = self._registry.starts_held(self._kind)
        self._registry.allow_starts(self._kind)
        return held

    def next_action(self, replica: Replica) -> Action | None:
        """Return the next action by which the server comes to hold the memory that it should, if one is needed."""
        if self._released - replica.asleep:
            return sleep_action(replica, self._released)
        for tag in sorted(replica.asleep - self._released, key=SLEEPING.index, reverse=True):
            return wake_action(replica, tag)
        return None

    async def memory_holders(self, replicas: dict[str, Replica]) -> list[str]:
        """Return the names of the servers that are starting, or hold memory that they should have released."""
        # A server is registered before its mark as starting is removed.
        starting = await asyncio.to_thread(self._registry.starting_servers, self._kind)
        registered = await asyncio.to_thread(self._registry.all)
        return starting + [
            server.name
            for server in registered
            if server.kind == self._kind
            and (
                (replica := replicas.get(server.name)) is None or replica.server != server or self.next_action(replica)
            )
        ]
