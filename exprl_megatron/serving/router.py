"""Clients of sglang-router in front of a run's servers, which give it the list of servers."""

import asyncio
import math
from collections.abc import Collection, Sequence
from typing import Any

from exprl_megatron.errors import RequestRefused, ServerError
from exprl_megatron.serving.generation import Generation
from exprl_megatron.serving.health import healthy
from exprl_megatron.serving.registered_client import RegisteredClient
from exprl_megatron.serving.registry import Kind, Registry
from exprl_megatron.utils.together import gather_or_cancel

_POLL_S = 0.25
_FRESH_S = 0.5
_RETRY_S = 5.0


class RouterClient(RegisteredClient):
    """Sends requests through the router, which chooses the server."""

    async def generate_all(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **keywords: Any
    ) -> list[Generation]:
        """Send one request per prompt, since the router's request form has one continuation; see SGLangClient."""
        return await gather_or_cancel(
            self.generate(prompt, seed=seed, **keywords) for prompt, seed in zip(prompts, seeds, strict=True)
        )

    async def route_to(self, urls: Collection[str], deadline_s: float) -> None:
        """Make `urls` the router's workers; returns when the router finds all of them healthy.

        Raises ServerError where it does not within `deadline_s`, which includes the time of a router's restart.
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
        """Return whether the router has these workers already; adds missing workers and removes others."""
        reply = await self._request("GET", "/workers", None, None)
        workers = self._read("/workers", lambda r: {w["url"]: (w["id"], w["is_healthy"]) for w in r["workers"]}, reply)
        for url in workers.keys() - urls:
            await self._request("DELETE", f"/workers/{workers[url][0]}", None, None)
        for url in urls - workers.keys():
            await self._post("/workers", {"url": url} | self._key_of(url))
        return workers.keys() == urls and all(healthy for _, healthy in workers.values())

    def _key_of(self, url: str) -> dict[str, str]:
        """Return the key that the router needs for the server at `url`."""
        server = next((server for server in self._registry.all() if server.url == url), None)
        key = None if server is None else self._registry.key(server)
        return {} if key is None else {"api_key": str(key)}


class RoutedClient(RouterClient):
    """A client of all servers of one kind through the router, which receives the list of servers that answer.

    The list is renewed when servers register, when a request fails, and every few seconds while a server does not
    answer.
    """

    def __init__(self, registry: Registry, name: str, kind: Kind, deadline_s: float):
        super().__init__(registry, name, deadline_s)
        self._kind = kind
        self._listed: set[str] | None = None
        """URLs of the registered servers at the last update of the router; None where it needs a new one."""
        self._next_look = 0.0
        self._next_update = math.inf
        self._updating = asyncio.Lock()

    async def generate(self, *args: Any, **keywords: Any) -> Generation:
        """Generate as SGLangClient does. Also raises ServerError where no server of the kind answers."""
        await self._update_router(self.deadline_s)
        try:
            return await super().generate(*args, **keywords)
        except RequestRefused:
            raise
        except ServerError:
            self._listed = None
            raise

    async def health(self, *, deadline_s: float = 10.0) -> None:
        """Return if a server of the kind answers and the router uses it. Raises ServerError otherwise."""
        self._listed = None
        await self._update_router(deadline_s)

    async def _update_router(self, deadline_s: float) -> None:
        """Make the registered servers that answer the router's workers."""
        loop = asyncio.get_running_loop()
        async with self._updating:
            if self._listed is not None and loop.time() < self._next_look:
                return
            servers = await asyncio.to_thread(self._registry.all)
            urls = {server.url for server in servers if server.kind == self._kind}
            if urls != self._listed or loop.time() >= self._next_update:
                answers = await asyncio.gather(*(asyncio.to_thread(healthy, url) for url in urls))
                healthy_urls = {url for url, answer in zip(urls, answers, strict=True) if answer}
                if not healthy_urls:
                    raise self._error("/generate", f"none of {len(urls)} registered {self._kind} servers answers")
                await self.route_to(healthy_urls, deadline_s)
                self._listed = urls
                self._next_update = math.inf if healthy_urls == urls else loop.time() + _RETRY_S
            self._next_look = loop.time() + _FRESH_S
