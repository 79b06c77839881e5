"""Waits for a server that another process started."""

import asyncio

from exprl_megatron.errors import ServerError
from exprl_megatron.processes.log_tail import log_tail
from exprl_megatron.serving.client import SGLangClient

_POLL_S = 0.5


async def wait_ready(client: SGLangClient, deadline_s: float) -> None:
    """Return when the server answers /health.

    Raises:
        ServerError: it does not answer within `deadline_s` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while True:
        try:
            return await client.health()
        except ServerError as error:
            if loop.time() > deadline:
                raise ServerError(
                    f"{client.name} ({client.url}) did not answer /health within start_deadline_s ({deadline_s:g} s)."
                    f"{log_tail(client.log_file)}"
                ) from error
        await asyncio.sleep(_POLL_S)
