"""The pool of a run's sampling servers: which servers hold the current weights, and which may receive requests.

A server that has registered is *pending* until the current weights have been pushed to it, then *healthy*. A server
that fails is *unhealthy*: its requests are sent to another server, and it is pending again after it has answered a
probe. A server that fails several times in a row is restarted by its supervisor and then counts as a new server.

Why not sglang-router alone: it balances requests over servers, but it neither knows which weights a server holds nor
withholds requests until a server has the current weights. With `server.router` the router chooses the server, and this
class gives it the list of servers to choose from.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import RequestRefused, ServerError, WeightsReplaced
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.pool_memory import PoolMemory
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.replica import Action, Replica
from exprl_megatron.serving.router import RouterClient
from exprl_megatron.serving.shared_environment import nccl_difference
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.text_check import TextCheck

_POLL_S = 0.25
_WAIT_POLL_S = 0.02
_MAX_FAILURES = 3
"""Failures in a row after which a server is restarted."""
_LONGEST_PAUSE_S = 30.0
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
        kind: str = "policy",
        router: RouterClient | None = None,
        log: Callable[[str], None] = lambda text: None,
        vocabulary: int | None = None,
    ):
        self._registry = registry
        self._config = config
        self._kind = kind
        self._log = log
        self._router = router
        self._vocabulary = vocabulary
        if router is not None:
            router.vocabulary = vocabulary
        self._routed: set[str] = set()
        """The servers that were registered with the router."""
        self._routing = asyncio.Lock()
        self._checking = asyncio.Lock()
        self._loading = asyncio.Lock()
        self._replicas: dict[str, Replica] = {}
        self._prepared: list[Replica] = []
        self._version: str | None = None
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._last_failure = "none has registered"
        self._no_server_since = 0.0
        self._failed_pushes = 0
        self._lost = 0
        self._memory = PoolMemory(registry, kind)
        self._watcher: asyncio.Task | None = None

    async def open(self) -> None:
        """Return when `count` servers have registered and answered.

        Raises:
            ServerError: they did not within start_deadline_s.
        """
        loop = asyncio.get_running_loop()
        # An earlier run may have ended while its servers slept.
        self._allow_starts()
        self._no_server_since = loop.time()
        if self._router is not None:
            self._router.text_check = self.text_check
            await self._router.__aenter__()
        self._watcher = loop.create_task(self._watch())
        while len(self._in_state("pending")) < self._config.count:
            self._raise_watch_error()
            if loop.time() - self._no_server_since > self._config.start_deadline_s:
                here = ", ".join(replica.server.name for replica in self._in_state("pending")) or "none"
                raise ServerError(
                    f"{self._config.count} {self._kind} servers were to register in {self._registry.directory} within "
                    f"start_deadline_s ({self._config.start_deadline_s:g} s), but {here} did. The last event: "
                    f"{self._last_failure}"
                )
            await asyncio.sleep(_POLL_S)

    def take_metrics(self) -> dict[str, float]:
        """Return the number of healthy servers, and how often one was lost since the last call.

        A server is lost where it fails a request or a check, and where it is no longer registered.
        """
        lost, self._lost = self._lost, 0
        return {"servers/serving": float(len(self._in_state("healthy"))), "servers/lost": float(lost)}

    async def close(self) -> None:
        """Disconnect from all servers."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._router is not None:
            await self._router.__aexit__()
        for replica in self._replicas.values():
            await replica.client.__aexit__()

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
                    self._mark_unhealthy(replica, str(error))
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
                await asyncio.sleep(_POLL_S * attempt)

    async def wait_for(self, work: Future, patience_s: float) -> Literal["done", "weights", "nothing"]:
        """Wait up to `patience_s` seconds for `work`, which sends requests to these servers.

        Returns `done`, `nothing` after the timeout, or `weights` where the work cannot continue before a weight
        update: no server is healthy, and a pending one needs weights.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + patience_s
        while not work.done():
            if not self._in_state("healthy") and self._in_state("pending"):
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
        await self._call_healthy(lambda client: client.pause(mode))

    async def continue_generation(self) -> None:
        """Continue paused requests, and send the ones that were held back."""
        await self._call_healthy(lambda client: client.continue_())
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
        self._memory.sleep()
        await self._match_memory()
        until = asyncio.get_running_loop().time() + self._config.start_deadline_s
        while holders := await self._memory.memory_holders(self._replicas):
            self._raise_watch_error()
            if asyncio.get_running_loop().time() > until:
                raise ServerError(
                    f"{', '.join(holders)} did not release memory for the trainer within start_deadline_s "
                    f"({self._config.start_deadline_s:g} s); see the server's log, and continue with --resume. The "
                    f"last event: {self._last_failure}"
                )
            await asyncio.sleep(_POLL_S)
        return True

    async def wake(self, tag: str) -> None:
        """Make all servers resume the memory of `tag`; when none is released any more, other servers may start."""
        self._memory.wake(tag)
        await self._match_memory()
        if self._memory.awake:
            self._allow_starts()

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
                await self._call_healthy(load)
                await self._route()

    @property
    def version(self) -> str | None:
        """Version of the weights that the servers received last; None where that failed."""
        return self._version

    @property
    def has_healthy(self) -> bool:
        """Whether a server may receive requests."""
        return bool(self._in_state("healthy"))

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
                await self._call_healthy(check)
        if replaced and not self._in_state("healthy", "pending"):
            raise WeightsReplaced(f"{replaced[0]} No other server is left; stop that client, then use --resume.")

    async def prepare(self, version: str) -> bool:
        """Return whether weights must be pushed to `clients`, since one of them does not have `version`.

        Waits for a server where there is none. Raises ServerError where none registers within start_deadline_s.
        """
        while not self._in_state("healthy", "pending"):
            # It starts while the policy's weights are on the device, since it receives a copy of them.
            self._allow_starts()
            await self._next_change()
        if version == self._version and not self._in_state("pending"):
            return False
        self._prepared = self._in_state("healthy", "pending")
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
        await asyncio.gather(*(self._reset(replica) for replica in self._prepared if replica.state == "pending"))
        if all(replica.state == "pending" for replica in self._prepared):
            self._failed_pushes += 1
            if self._failed_pushes > 1:
                raise error
        self._log(f"weights did not arrive and are sent again: {_first_line(str(error))}")

    async def _route(self) -> None:
        """Give the router, if there is one, the list of healthy servers.

        Raises ServerError where the router does not use them within start_deadline_s.
        """
        if self._router is None:
            return
        async with self._routing:
            urls = {replica.server.url for replica in self._in_state("healthy")}
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
            self._log(f"a request failed: {_first_line(str(error))}")
            await self._call_healthy(check)
            await self._route()

    def _in_state(self, *states: str) -> list[Replica]:
        """Return the servers in one of `states`, sorted by name."""
        replicas = (self._replicas[name] for name in sorted(self._replicas))
        return [replica for replica in replicas if replica.state in states]

    async def _healthy_replica(self, home: int) -> Replica:
        while True:
            self._raise_watch_error()
            await self._may_send.wait()
            healthy = self._in_state("healthy")
            if healthy:
                return healthy[home % len(healthy)]
            await self._next_change()

    async def _next_change(self) -> None:
        """Sleep for a poll interval. Raises ServerError where there has been no server for start_deadline_s."""
        self._raise_watch_error()
        if asyncio.get_running_loop().time() - self._no_server_since > self._config.start_deadline_s:
            raise ServerError(
                f"There has been no {self._kind} server for start_deadline_s ({self._config.start_deadline_s:g} s); "
                f"continue with --resume. The last event: {self._last_failure}"
            )
        await asyncio.sleep(_POLL_S)

    def _raise_watch_error(self) -> None:
        """Raise the error that ended the task which watches the registry."""
        if self._watcher.done():
            try:
                self._watcher.result()
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _watch(self) -> None:
        """Follow the registry, and probe unhealthy servers when they are due."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tries:
            while True:
                registered = [s for s in await asyncio.to_thread(self._registry.all) if s.kind == self._kind]
                for sentence in self._registry.warnings():
                    self._log(sentence)
                await self._follow_registry({server.name: server for server in registered})
                for replica in self._replicas.values():
                    if replica.state == "unhealthy" and loop.time() >= replica.next_try:
                        replica.next_try = math.inf
                        tries.create_task(self._reset(replica))
                if (
                    self._routed - {replica.server.url for replica in self._in_state("healthy")}
                    and not self._routing.locked()
                ):
                    tries.create_task(self._route())
                if self._in_state("healthy", "pending"):
                    self._no_server_since = loop.time()
                await asyncio.sleep(_POLL_S)

    async def _follow_registry(self, registered: dict[str, RegisteredServer]) -> None:
        """Remove the servers that are not in `registered` any more, and add the new ones."""
        for name, replica in list(self._replicas.items()):
            if registered.get(name) != replica.server:
                self._last_failure = f"{name} ({replica.server.url}) is not registered any more"
                self._log(self._last_failure)
                del self._replicas[name]
                self._lost += replica.state != "unhealthy"
                replica.state = "unhealthy"
                replica.release()
                await replica.client.__aexit__()
        for name, server in registered.items():
            if name not in self._replicas:
                headers = self._registry.authorization(server)
                replica = Replica(server, self._config.request_deadline_s, headers)
                replica.client.vocabulary, replica.client.text_check = self._vocabulary, self.text_check
                await replica.client.__aenter__()
                self._replicas[name] = replica
                if (sentence := nccl_difference(server, self._config)) is not None:
                    self._log(sentence)

    async def _reset(self, replica: Replica) -> None:
        """Abort the requests that an earlier run, or this one, may have left in flight; the server is pending then."""
        deadline_s = self._config.answer_deadline_s
        if not await self._succeeds(replica, lambda client: client.reset(deadline_s=deadline_s)):
            return
        if await self._matches_memory(replica):
            replica.state = "pending"

    async def _match_memory(self) -> None:
        """Make all servers hold the memory that they should."""
        await asyncio.gather(*(self._matches_memory(replica) for replica in self._in_state("healthy", "pending")))

    async def _matches_memory(self, replica: Replica) -> bool:
        """Make the server hold the memory that it should, which may change meanwhile; returns whether it does."""
        while (action := self._memory.next_action(replica)) is not None:
            if not await self._succeeds(replica, action):
                return False
        return True

    def _allow_starts(self) -> None:
        """Let servers start that were not allowed to, and wait for them as at the start of the run."""
        if self._memory.allow_starts():
            self._no_server_since = asyncio.get_running_loop().time()

    async def _call_healthy(self, call: Action) -> None:
        """Run `call` on every healthy server; servers that fail become unhealthy."""
        await asyncio.gather(*(self._succeeds(replica, call) for replica in self._in_state("healthy")))

    async def _succeeds(self, replica: Replica, call: Action) -> bool:
        """Run `call` on the server and return whether it succeeded; a server that fails becomes unhealthy."""
        try:
            await call(replica.client)
        except ServerError as error:
            self._mark_unhealthy(replica, str(error))
            return False
        return self._replicas.get(replica.server.name) is replica

    def _mark_unhealthy(self, replica: Replica, why: str) -> None:
        """Send no more requests to this server until it has answered a probe."""
        if self._replicas.get(replica.server.name) is not replica:
            return
        self._last_failure = why
        self._log(f"{replica.server.name} is unhealthy: {_first_line(why)}")
        self._lost += replica.state != "unhealthy"
        replica.state = "unhealthy"
        replica.failures += 1
        pause_s = min(2.0 ** (replica.failures - 1), _LONGEST_PAUSE_S)
        replica.next_try = asyncio.get_running_loop().time() + pause_s
        if replica.failures >= _MAX_FAILURES:
            self._registry.request_restart(replica.server)
        replica.release()


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
