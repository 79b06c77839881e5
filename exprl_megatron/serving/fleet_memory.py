"""Which memory the servers of a fleet have given up, and that none starts while they sleep.

A server takes a share of what it finds free of its GPU when it starts (SGLang: `--mem-fraction-static` of it), and the
trainer what it needs when it learns. So no server starts while the trainer learns on its GPU, and the trainer takes
nothing while a server starts there. Each says so in the registry before it looks what the other one says.
"""

import asyncio

from exprl_megatron.serving.member import SLEEPING, Member, Order, to_sleep, to_wake
from exprl_megatron.serving.registry import Kind, Registry


class FleetMemory:
    """Of the servers of `kind` in `registry`."""

    def __init__(self, registry: Registry, kind: Kind):
        self._registry = registry
        self._kind = kind
        self._given_up: set[str] = set()
        """What of SLEEPING each server is to have given up."""

    def sleep(self) -> None:
        """From now on servers sleep, and none starts."""
        self._given_up = set(SLEEPING)
        self._registry.hold_starts(self._kind)

    def wake(self, tag: str) -> None:
        """From now on servers have their `tag`."""
        self._given_up.discard(tag)

    @property
    def awake(self) -> bool:
        """Whether servers have all their memory."""
        return not self._given_up

    def let_start(self) -> bool:
        """Let servers start; whether they were kept from it."""
        held = self._registry.starts_held(self._kind)
        self._registry.allow_starts(self._kind)
        return held

    def order(self, member: Member) -> Order | None:
        """What the server is to do next to have the memory that it should have, if anything."""
        if self._given_up - member.asleep:
            return to_sleep(member, self._given_up)
        for tag in sorted(member.asleep - self._given_up, key=SLEEPING.index, reverse=True):
            return to_wake(member, tag)
        return None

    async def holders(self, members: dict[str, Member]) -> list[str]:
        """Names of the servers that start, or are registered and have not given up all that they should."""
        # One that is ready is registered before it is no longer said to start.
        starting = await asyncio.to_thread(self._registry.starting, self._kind)
        registered = await asyncio.to_thread(self._registry.all)
        return starting + [
            server.name
            for server in registered
            if server.kind == self._kind
            and ((member := members.get(server.name)) is None or member.server != server or self.order(member))
        ]
