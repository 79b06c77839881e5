"""The servers of a pool: which are registered, which are healthy, and which memory they hold.

A server that has registered is *pending* until it has the current weights, then *healthy*. One that fails is
*unhealthy*, and pending again after it has answered a probe. One that fails several times in a row is restarted by its
supervisor and then counts as a new server.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.serving.pool_memory import PoolMemory
from exprl_megatron.serving.registry import Kind, RegisteredServer, Registry
from exprl_megatron.serving.replica import Action, Replica
from exprl_megatron.serving.shared_environment import nccl_difference
from exprl_megatron.utils.text_check import TextCheck

_POLL_S = 0.25
_MAX_FAILURES = 3
"""Failures in a row after which a server is restarted."""
_LONGEST_PAUSE_S = 30.0


class PoolMembers:
    """The servers of `kind` in `registry`; used in one event loop between `open` and `close`.

    Args:
        registry: registrations of the servers.
        config: how many servers there are at the start, and their deadlines.
        kind: the servers' kind.
        log: receives a line for everything that a user should know.
        vocabulary: see SGLangClient.
    """

    text_check: TextCheck | None = None
    """See SGLangClient; set before `open`."""

    def __init__(
        self,
        registry: Registry,
        config: ServerConfig,
        kind: Kind,
        log: Callable[[str], None],
        vocabulary: int | None,
    ):
        self._registry = registry
        self._config = config
        self._kind = kind
        self._log = log
        self._vocabulary = vocabulary
        self._replicas: dict[str, Replica] = {}
        self._memory = PoolMemory(registry, kind)
        self._last_failure = "none has registered"
        self._no_server_since = 0.0
        self._lost = 0
        self._watcher: asyncio.Task | None = None

    async def open(self, follow_up: Callable[[], Coroutine[Any, Any, None] | None]) -> None:
        """Return when the config's `count` servers have registered and answered.

        `follow_up` is called after each look at the registry; what it returns, if anything, runs beside the next looks.

        Raises:
            ServerError: they did not within start_deadline_s.
        """
        loop = asyncio.get_running_loop()
        # An earlier run may have ended while its servers slept.
        self.allow_starts()
        self._no_server_since = loop.time()
        self._watcher = loop.create_task(self._watch(follow_up))
        while len(self.in_state("pending")) < self._config.count:
            self.raise_watch_error()
            if loop.time() - self._no_server_since > self._config.start_deadline_s:
                here = ", ".join(replica.server.name for replica in self.in_state("pending")) or "none"
                raise ServerError(
                    f"{self._config.count} {self._kind} servers were to register in {self._registry.directory} within "
                    f"start_deadline_s ({self._config.start_deadline_s:g} s), but {here} did. The last event: "
                    f"{self._last_failure}"
                )
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """End the task that follows the registry."""
        if self._watcher is not None:
            self._watcher.cancel()
            # It and the resets that it has started still use the clients.
            await asyncio.wait([self._watcher])

    async def close(self) -> None:
        """Disconnect from all servers, after `stop`."""
        for replica in self._replicas.values():
            await replica.client.__aexit__()

    def take_lost(self) -> int:
        """Return how often a server was lost since the last call: failed, or no longer registered."""
        lost, self._lost = self._lost, 0
        return lost

    def in_state(self, *states: str) -> list[Replica]:
        """Return the servers in one of `states`, sorted by name."""
        replicas = (self._replicas[name] for name in sorted(self._replicas))
        return [replica for replica in replicas if replica.state in states]

    async def call_healthy(self, call: Action) -> None:
        """Run `call` on every healthy server; servers that fail become unhealthy."""
        await asyncio.gather(*(self._succeeds(replica, call) for replica in self.in_state("healthy")))

    def mark_unhealthy(self, replica: Replica, why: str) -> None:
        """Send no more requests to this server until it has answered a probe."""
        if self._replicas.get(replica.server.name) is not replica:
            return
        self._last_failure = why
        self._log(f"{replica.server.name} is unhealthy: {first_line(why)}")
        self._lost += replica.state != "unhealthy"
        replica.state = "unhealthy"
        replica.failures += 1
        pause_s = min(2.0 ** (replica.failures - 1), _LONGEST_PAUSE_S)
        replica.next_try = asyncio.get_running_loop().time() + pause_s
        if replica.failures >= _MAX_FAILURES:
            self._registry.request_restart(replica.server)
        replica.release()

    async def reset(self, replica: Replica) -> None:
        """Abort the requests that an earlier run, or this one, may have left in flight; the server is pending then."""
        deadline_s = self._config.answer_deadline_s
        if not await self._succeeds(replica, lambda client: client.reset(deadline_s=deadline_s)):
            return
        if await self._matches_memory(replica):
            replica.state = "pending"

    async def next_change(self) -> None:
        """Sleep for a poll interval.

        Raises:
            ServerError: there has been no server for start_deadline_s.
        """
        self.raise_watch_error()
        if asyncio.get_running_loop().time() - self._no_server_since > self._config.start_deadline_s:
            raise ServerError(
                f"There has been no {self._kind} server for start_deadline_s ({self._config.start_deadline_s:g} s); "
                f"continue with --resume. The last event: {self._last_failure}"
            )
        await asyncio.sleep(_POLL_S)

    def raise_watch_error(self) -> None:
        """Raise the error that ended the task which watches the registry."""
        if self._watcher.done():
            try:
                self._watcher.result()
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    def allow_starts(self) -> None:
        """Let servers start that were not allowed to, and wait for them as at the start of the run."""
        if self._memory.allow_starts():
            self._no_server_since = asyncio.get_running_loop().time()

    async def sleep(self) -> None:
        """Make all servers release their GPU memory; returns when none holds any, and none is starting.

        Raises:
            ServerError: servers still hold memory after start_deadline_s; the error names them.
        """
        self._memory.sleep()
        await self._match_memory()
        until = asyncio.get_running_loop().time() + self._config.start_deadline_s
        while holders := await self._memory.memory_holders(self._replicas):
            self.raise_watch_error()
            if asyncio.get_running_loop().time() > until:
                raise ServerError(
                    f"{', '.join(holders)} did not release memory for the trainer within start_deadline_s "
                    f"({self._config.start_deadline_s:g} s); see the server's log, and continue with --resume. The "
                    f"last event: {self._last_failure}"
                )
            await asyncio.sleep(_POLL_S)

    async def wake(self, tag: str) -> None:
        """Make all servers resume the memory of `tag`; when none is released any more, other servers may start."""
        self._memory.wake(tag)
        await self._match_memory()
        if self._memory.awake:
            self.allow_starts()

    async def _watch(self, follow_up: Callable[[], Coroutine[Any, Any, None] | None]) -> None:
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
                        tries.create_task(self.reset(replica))
                if (then := follow_up()) is not None:
                    tries.create_task(then)
                if self.in_state("healthy", "pending"):
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

    async def _match_memory(self) -> None:
        """Make all servers hold the memory that they should."""
        await asyncio.gather(*(self._matches_memory(replica) for replica in self.in_state("healthy", "pending")))

    async def _matches_memory(self, replica: Replica) -> bool:
        """Make the server hold the memory that it should, which may change meanwhile; returns whether it does."""
        while (action := self._memory.next_action(replica)) is not None:
            if not await self._succeeds(replica, action):
                return False
        return True

    async def _succeeds(self, replica: Replica, call: Action) -> bool:
        """Run `call` on the server and return whether it succeeded; a server that fails becomes unhealthy."""
        try:
            await call(replica.client)
        except ServerError as error:
            self.mark_unhealthy(replica, str(error))
            return False
        return self._replicas.get(replica.server.name) is replica


def first_line(text: str) -> str:
    """Return the first line of an error, for the log."""
    return text.partition("\n")[0]
