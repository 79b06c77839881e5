"""A client of a server that is looked up by its name: after a restart, it is found at its new address."""

import time
from collections.abc import Callable
from pathlib import Path

from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.http_client import REPLY_LIMIT
from exprl_megatron.serving.registry import RegisteredServer, Registry

_FRESH_S = 0.5


class RegisteredClient(SGLangClient):
    """See SGLangClient; before a request its address is read again, at most twice a second.

    `found` is called with each registration of the server that is not the one before.
    """

    def __init__(
        self,
        registry: Registry,
        name: str,
        deadline_s: float,
        found: Callable[[RegisteredServer], None] = lambda server: None,
    ):
        super().__init__("not registered", name, None, deadline_s)
        self._found = found
        self._registry = registry
        self._read_at = -_FRESH_S
        self._server: RegisteredServer | None = None

    async def _exchange(
        self, method: str, path: str, body: dict | None, deadline_s: float | None, limit: int = REPLY_LIMIT
    ) -> bytes:
        if time.monotonic() - self._read_at >= _FRESH_S:
            self._read_at = time.monotonic()
            server = self._registry.find(self.name)
            if server is not None and server != self._server:
                self._server, self.url, self.log_file = server, server.url, Path(server.log_file)
                self.headers, self.first_gpu = self._registry.authorization(server), server.first_gpu
                self._found(server)
        return await super()._exchange(method, path, body, deadline_s, limit)
