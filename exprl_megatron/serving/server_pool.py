"""The pool of a run's sampling servers: which servers hold the current weights, and which may receive requests.

A server is *pending* until the current weights have been pushed to it, and receives requests while it is *healthy*; the
requests of one that fails are sent to another (see pool_members.py).

Why not sglang-router alone: it balances requests over servers, but it neither knows which weights a server holds nor
withholds requests until a server has the current weights. With `server.router` the router chooses the server, and this
class gives it the list of servers to choose from.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import RequestRefused, ServerError, WeightsReplaced
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.pool_members import PoolMembers, first_line
from exprl_megatron.serving.registry import Kind, Registry
from exprl_megatron.serving.replica import Replica
from exprl_megatron.serving.router import RouterClient
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.text_check import TextCheck

_WAIT_POLL_S = 0.02
_RETRY_S = 0.25
"""The router's repetitions wait so much longer each."""
_MAX_ATTEMPTS = 10
"""A request that fails this often fails the run."""


class ServerPool:
    """The servers of `kind` in `registry`; used in one event loop between `open` and `close`.

    `log` receives a line for everything that a user should know. The config's `count` servers exist at the start; more
    may register later. A reply with a token id beyond `vocabulary` is refused, and so is a reply whose text is not that
    of its token ids (`text_check`).
    """

    text_check: TextCheck | None = None

    def __init__(
        self,
        registry: Registry,
        config: ServerConfig,
        kind: Kind = "policy",
        router: RouterClient | None = None,
        log: Callable[[str], None] = lambda text: None,
        vocabulary: int | None = None,
    ):
        self._members = PoolMembers(registry, config, kind, log, vocabulary)
        self._config = config
        self._log = log
        self._router = router
        if router is not None:
            router.vocabulary = vocabulary
        self._routed: set[str] = set()
        """The servers that were registered with the router."""
        self._routing = asyncio.Lock()
        self._checking = asyncio.Lock()
        self._loading = asyncio.Lock()
        self._prepared: list[Replica] = []
        self._version: str | None = None
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._failed_pushes = 0

    async def open(self) -> None:
        """Return when `count` servers have registered and answered.

        Raises:
            ServerError: they did not within start_deadline_s.
        """
        if self._router is not None:
            self._router.text_check = self.text_check
            await self._router.__aenter__()
        self._members.text_check = self.text_check
        await self._members.open(self._rerouting)

    def take_metrics(self) -> dict[str, float]:
        """Return the number of healthy servers, and how often one was lost since the last call.

        A server is lost where it fails a request or a check, and where it is no longer registered.
        """
        lost = self._members.take_lost()
        return {"servers/serving": float(len(self._members.in_state("healthy"))), "servers/lost": float(lost)}

    async def close(self) -> None:
        """Disconnect from all servers."""
        await self._members.stop()
        if self._router is not None:
            await self._router.__aexit__()
        await self._members.close()

    async def ask[T](self, home: int, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """Call `call` with the client of a healthy server and return its result; preferably of server number `home`.

        `home` is taken modulo the number of healthy servers. Where `call` raises ServerError, its server becomes
        unhealthy and the call is repeated on another. Waits while generation is paused, and while no server is healthy.
        Raises RequestRefused as `call` does, and ServerError where there has been no server for start_deadline_s, or
        where `call` has failed _MAX_ATTEMPTS times, on whichever servers.
        """
        attempts = 0
        if self._router is not None:
            return await self._ask_router(call)
        while True:
            replica = await self._healthy_replica(home)
            task = asyncio.ensure_future(call(replica.client))
            replica.running.add(task)
            try:
                answer = await task
                replica.failures = 0
                return answer
            except RequestRefused:
                raise
            except ServerError as error:
                attempts += 1
                if replica.state != "unhealthy":
                    self._members.mark_unhealthy(replica, str(error))
                if attempts == _MAX_ATTEMPTS:
                    raise
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():
                    raise
            finally:
                replica.running.discard(task)

    async def _ask_router[T](self, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """Send a request as `ask` does, where the router chooses the server."""
        for attempt in range(_MAX_ATTEMPTS):
            await self._healthy_replica(0)
            try:
                return await call(self._router)
            except RequestRefused:
                raise
            except ServerError as error:
                if attempt + 1 == _MAX_ATTEMPTS:
                    raise
                await self._check_after_failure(error)
                await asyncio.sleep(_RETRY_S * attempt)

    async def wait_for(self, work: Future, patience_s: float) -> Literal["done", "weights", "nothing"]:
        """Wait up to `patience_s` seconds for `work`, which sends requests to these servers.

        Returns `done`, `nothing` after the timeout, or `weights` where the work cannot continue before a weight
        update: no server is healthy, and a pending one needs weights.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + patience_s
        while not work.done():
            if not self._members.in_state("healthy") and self._members.in_state("pending"):
                return "weights"
            if loop.time() > until:
                return "nothing"
            await asyncio.sleep(_WAIT_POLL_S)
        return "done"

    @property
    def clients(self) -> list[SGLangClient]:
        """Clients of the servers that were prepared for the last sync."""
        return [replica.client for replica in self._prepared]

    async def pause_generation(self, mode: Literal["retract", "in_place"]) -> None:
        """Pause the requests in flight, and hold back new ones."""
        self._may_send.clear()
        await self._members.call_healthy(lambda client: client.pause(mode))

    async def continue_generation(self) -> None:
        """Continue paused requests, and send the ones that were held back."""
        await self._members.call_healthy(lambda client: client.continue_())
        self._may_send.set()

    async def sleep(self) -> bool:
        """Make all servers release their GPU memory; returns False on a CPU, where servers cannot.

        Returns when no registered server holds any, and none is starting.

        Raises:
            ServerError: servers still hold memory after start_deadline_s; the error names them.
        """
        if not uses_cuda():
            return False
        # Released memory comes back with undefined content, so the same version has to be pushed again.
        self._version = None
        await self._members.sleep()
        return True

    async def wake(self, tag: str) -> None:
        """Make all servers resume the memory of `tag`; when none is released any more, other servers may start."""
        await self._members.wake(tag)

    async def load_judge_weights(self, model: Path, version: str, deadline_s: float) -> None:
        """Load the weights in directory `model`, as `version`, into the healthy servers, until others are pushed.

        Requests in flight are aborted. A server that fails to load them becomes unhealthy.
        """

        async def load(client: SGLangClient) -> None:
            await client.reset(deadline_s=self._config.answer_deadline_s)
            await client.update_from_disk(model, version, deadline_s=deadline_s)

        async with self._loading:
            if version != self._version:
                self._version = version
                await self._members.call_healthy(load)
                await self._route()

    @property
    def version(self) -> str | None:
        """Version of the weights that the servers received last; None where that failed."""
        return self._version

    @property
    def has_healthy(self) -> bool:
        """Whether a server may receive requests."""
        return bool(self._members.in_state("healthy"))

    async def check_served(self) -> None:
        """Ask every healthy server which weights it serves; one with other weights than we pushed becomes unhealthy.
        Does nothing while the servers' version is not known.

        Raises:
            WeightsReplaced: no server is left then.
        """
        replaced: list[WeightsReplaced] = []

        async def check(client: SGLangClient) -> None:
            try:
                await client.check_served(self._version, deadline_s=self._config.answer_deadline_s)
            except WeightsReplaced as error:
                replaced.append(error)
                raise

        async with self._loading:
            if self._version is not None:
                await self._members.call_healthy(check)
        if replaced and not self._members.in_state("healthy", "pending"):
            raise WeightsReplaced(f"{replaced[0]} No other server is left; stop that client, then use --resume.")

    async def prepare(self, version: str) -> bool:
        """Return whether weights must be pushed to `clients`, since one of them does not have `version`.

        Waits for a server where there is none. Raises ServerError where none registers within start_deadline_s.
        """
        while not self._members.in_state("healthy", "pending"):
            # It starts while the policy's weights are on the device, since it receives a copy of them.
            self._members.allow_starts()
            await self._members.next_change()
        if version == self._version and not self._members.in_state("pending"):
            return False
        self._prepared = self._members.in_state("healthy", "pending")
        return True

    async def commit(self, version: str) -> None:
        """Record that the prepared servers hold `version`, as their replies show."""
        self._version = version
        self._failed_pushes = 0
        for replica in self._prepared:
            if replica.state == "pending":
                replica.state = "healthy"
        await self._route()

    async def abort(self, error: ServerError) -> None:
        """Handle a failed push: prepared servers that answer a probe are pending, the others unhealthy.

        Raises `error` where the push fails again although all servers are healthy.
        """
        self._version = None
        for replica in self._prepared:
            if replica.state != "unhealthy":
                replica.state = "pending"
                replica.release()
        pending = [replica for replica in self._prepared if replica.state == "pending"]
        await asyncio.gather(*(self._members.reset(replica) for replica in pending))
        if all(replica.state == "pending" for replica in self._prepared):
            self._failed_pushes += 1
            if self._failed_pushes > 1:
                raise error
        self._log(f"weights did not arrive and are sent again: {first_line(str(error))}")

    def _rerouting(self) -> Coroutine[Any, Any, None] | None:
        """Return the update of the router that is due since one of its servers is not healthy any more, if it is."""
        healthy = {replica.server.url for replica in self._members.in_state("healthy")}
        return self._route() if self._routed - healthy and not self._routing.locked() else None

    async def _route(self) -> None:
        """Give the router, if there is one, the list of healthy servers.

        Raises ServerError where the router does not use them within start_deadline_s.
        """
        if self._router is None:
            return
        async with self._routing:
            urls = {replica.server.url for replica in self._members.in_state("healthy")}
            await self._router.route_to(urls, self._config.start_deadline_s)
            self._routed = urls

    async def _check_after_failure(self, error: ServerError) -> None:
        """Find, after a failed request through the router, the servers that do not answer or have other weights."""

        async def check(client: SGLangClient) -> None:
            await client.check_served(self._version, deadline_s=self._config.answer_deadline_s)
            await client.health(deadline_s=self._config.answer_deadline_s)

        if self._checking.locked():
            async with self._checking:
                return
        async with self._checking:
            # A paused server does not answer.
            await self._may_send.wait()
            self._log(f"a request failed: {first_line(str(error))}")
            await self._members.call_healthy(check)
            await self._route()

    async def _healthy_replica(self, home: int) -> Replica:
        while True:
            self._members.raise_watch_error()
            await self._may_send.wait()
            healthy = self._members.in_state("healthy")
            if healthy:
                return healthy[home % len(healthy)]
            await self._members.next_change()
