"""What sampling needs of servers, and servers that are always the same."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import SGLangClient


class Servers(Protocol):
    """What sampling needs of servers."""

    async def ask[T](self, home: int, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """See Fleet.ask."""


class FixedServers:
    """Servers that are always the same, each open already; what one of them fails at is an error."""

    def __init__(self, clients: Sequence[SGLangClient]):
        self.clients = list(clients)
        self._version: str | None = None

    async def ask[T](self, home: int, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """What `call` returns for server number `home`, modulo their number; raises what it does."""
        return await call(self.clients[home % len(self.clients)])

    async def prepare(self, version: str) -> bool:
        """Whether weights must be pushed to `clients`, since they do not have `version`."""
        return version != self._version

    async def commit(self, version: str) -> None:
        """All hold `version`."""
        self._version = version

    async def abort(self, error: ServerError) -> None:
        """Raises `error`."""
        raise error
