"""The interface of a pool of sampling servers, and a pool whose servers never change."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import SGLangClient


class SamplingServers(Protocol):
    """A pool that sends a call to one of its servers."""

    async def ask[T](self, home: int, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """Send a request as ServerPool.ask does."""


class StaticPool:
    """A pool of servers that never change, whose clients are open already; a failure of one is raised."""

    def __init__(self, clients: Sequence[SGLangClient]):
        self.clients = list(clients)
        self._version: str | None = None

    async def ask[T](self, home: int, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """Return the result of `call` for server number `home`, modulo their number; raises what `call` raises."""
        return await call(self.clients[home % len(self.clients)])

    async def prepare(self, version: str) -> bool:
        """Return whether weights must be pushed to `clients`, since they do not have `version`."""
        return version != self._version

    async def commit(self, version: str) -> None:
        """Record that all servers hold `version`."""
        self._version = version

    async def abort(self, error: ServerError) -> None:
        """Raise `error`."""
        raise error
