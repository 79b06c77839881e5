"""Waits for a server that another process started."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from exprl_megatron.errors import KeyRefused, ServerError

_POLL_S = 0.5


class CheckedServer(Protocol):
    """A client whose server can be checked."""

    name: str
    url: str

    async def health(self) -> None:
        """Return where the server is ready; else raise ServerError."""


async def wait_ready(client: CheckedServer, deadline_s: float, report: Callable[[str], None] | None = None) -> None:
    """Return when the server answers its health check.

    Args:
        client: an open client of the server.
        deadline_s: seconds to wait.
        report: is called once with the reason, where the server does not answer immediately.

    Raises:
        ServerError: it does not answer within `deadline_s` seconds.
        KeyRefused: it refuses the key.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while True:
        try:
            return await client.health()
        except KeyRefused:
            raise
        except ServerError as error:
            if loop.time() > deadline:
                raise ServerError(
                    f"{client.name} ({client.url}) was not ready within start_deadline_s ({deadline_s:g} s). {error}"
                ) from error
            if report is not None:
                report(f"waiting at most {deadline_s:g} s: {str(error).splitlines()[0]}")
                report = None
        await asyncio.sleep(_POLL_S)
