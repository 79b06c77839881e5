"""Routers in front of a run's servers: how they learn which servers to ask."""

import asyncio
import math
from collections.abc import Collection, Sequence
from typing import Any

from exprl_megatron.errors import RequestRefused, ServerError
from exprl_megatron.serving.client import Generation
from exprl_megatron.serving.health import healthy
from exprl_megatron.serving.registered_client import RegisteredClient
from exprl_megatron.serving.registry import Kind, Registry
from exprl_megatron.utils.together import gather_or_cancel

_POLL_S = 0.25
_FRESH_S = 0.5
_SILENT_S = 5.0


class RouterClient(RegisteredClient):
    """Sends requests to whichever server the router chooses."""

    async def generate_all(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **keywords: Any
    ) -> list[Generation]:
        """See SGLangClient; by a request each, since the router's own form of a request has one continuation."""
        return await gather_or_cancel(
            self.generate(prompt, seed=seed, **keywords) for prompt, seed in zip(prompts, seeds, strict=True)
        )

    async def route_to(self, urls: Collection[str], deadline_s: float) -> None:
        """Return when the router's workers are these, and all of them are healthy to it.

        Raises ServerError where that is not so within `deadline_s`, in which the router may have to be restarted.
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
            await self._post("/workers", {"url": url} | self._key_of(url))
        return workers.keys() == urls and all(healthy for _, healthy in workers.values())

    def _key_of(self, url: str) -> dict[str, str]:
        """What the router needs to ask the server at `url`."""
        server = next((server for server in self._registry.all() if server.url == url), None)
        key = None if server is None else self._registry.key(server)
        return {} if key is None else {"api_key": str(key)}


class RoutedServers(RouterClient):
    """All servers of one kind as if they were one: the router gets the list of those that answer.

    It gets a new list when others register, when a request fails, and every few seconds while one does not answer.
    """

    def __init__(self, registry: Registry, name: str, kind: Kind, deadline_s: float):
        super().__init__(registry, name, deadline_s)
        self._kind = kind
        self._told: set[str] | None = None
        """The registered servers in the router's last list; None where it is to get a new one."""
        self._look_at = 0.0
        self._tell_at = math.inf
        self._telling = asyncio.Lock()

    async def generate(self, *args: Any, **keywords: Any) -> Generation:
        """See SGLangClient; raises ServerError where no server of the kind answers, too."""
        await self._tell(self.deadline_s)
        try:
            return await super().generate(*args, **keywords)
        except RequestRefused:
            raise
        except ServerError:
            self._told = None
            raise

    async def health(self, *, deadline_s: float = 10.0) -> None:
        """Return where a server of the kind answers and the router asks it, else raise."""
        self._told = None
        await self._tell(deadline_s)

    async def _tell(self, deadline_s: float) -> None:
        """Let the router ask the registered servers that answer, and no other."""
        loop = asyncio.get_running_loop()
        async with self._telling:
            if self._told is not None and loop.time() < self._look_at:
                return
            servers = await asyncio.to_thread(self._registry.all)
            urls = {server.url for server in servers if server.kind == self._kind}
            if urls != self._told or loop.time() >= self._tell_at:
                answers = await asyncio.gather(*(asyncio.to_thread(healthy, url) for url in urls))
                well = {url for url, answer in zip(urls, answers, strict=True) if answer}
                if not well:
                    raise self._error("/generate", f"none of {len(urls)} registered {self._kind} servers answers")
                await self.route_to(well, deadline_s)
                self._told = urls
                self._tell_at = math.inf if well == urls else loop.time() + _SILENT_S
            self._look_at = loop.time() + _FRESH_S
