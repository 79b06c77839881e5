"""The router in front of sampling servers: how it is started, and how it is told which servers to ask."""

import asyncio
import sys
from collections.abc import Collection
from dataclasses import dataclass

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.launch import ServerSpec
from exprl_megatron.serving.ports import LOCAL, free_ports
from exprl_megatron.serving.registered_client import RegisteredClient

ROUTER = "router-0"
_POLL_S = 0.25


@dataclass(frozen=True)
class RouterSpec(ServerSpec):
    """One router to start, without workers; `config` is that of the servers behind it."""

    def command(self, port: int) -> list[str]:
        """Arguments of sglang-router, which neither tries again nor gives servers up: whoever asks does."""
        (metrics,) = free_ports(1, {port})
        command = [sys.executable, "-m", "sglang_router.launch_router", "--host", LOCAL, "--port", str(port)]
        command += ["--policy", "cache_aware", "--disable-retries", "--disable-circuit-breaker", "--log-level", "warn"]
        command += ["--health-check-interval-secs", "5", "--worker-startup-check-interval", "1"]
        command += ["--request-timeout-secs", str(int(self.config.request_deadline_s) + 1)]
        return [*command, "--prometheus-host", LOCAL, "--prometheus-port", str(metrics)]

    def check(self) -> None:
        """It needs no model."""


class RouterClient(RegisteredClient):
    """Sends requests to whichever server the router chooses."""

    async def route_to(self, urls: Collection[str], deadline_s: float) -> None:
        """Return when the router's workers are these, and all of them are healthy to it.

        Raises ServerError where that is not so within `deadline_s`, in which the router may have to be started anew.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + deadline_s
        while True:
            try:
                if await self._routed(set(urls)):
                    return
                missing = self._error("/workers", f"does not find {', '.join(sorted(urls))} healthy")
            except ServerError as error:
                missing = error
            if loop.time() > until:
                raise missing
            await asyncio.sleep(_POLL_S)

    async def _routed(self, urls: set[str]) -> bool:
        """Whether it is as wanted already; else what is missing or too much is changed."""
        reply = await self._request("GET", "/workers", None, None)
        workers = self._read("/workers", lambda r: {w["url"]: (w["id"], w["is_healthy"]) for w in r["workers"]}, reply)
        for url in workers.keys() - urls:
            await self._request("DELETE", f"/workers/{workers[url][0]}", None, None)
        for url in urls - workers.keys():
            await self._post("/workers", {"url": url})
        return workers.keys() == urls and all(healthy for _, healthy in workers.values())
