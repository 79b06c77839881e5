"""The sampling servers of a run, which come and go: who holds the current weights, and who may be asked.

A server that has registered is *joining* until the current weights were sent to it, then *serving*. One that fails
is *out*: what it was asked is asked of another server, and it joins again when it answers well, to get whatever weights
are current then. One that fails several times in a row is restarted by its keeper; a new incarnation of a
server is a new server to us.

Why not sglang-router alone: it balances requests over servers, but knows neither which server holds which weights nor
that one must not be asked before it has the current weights. With `server.router` it serves this class, which
gives it the list of servers that may be asked.
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
from exprl_megatron.serving.fleet_memory import FleetMemory
from exprl_megatron.serving.member import Member, Order
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.router import RouterClient
from exprl_megatron.serving.shared_environment import nccl_difference
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.text_check import TextCheck

_POLL_S = 0.25
_ATTEND_S = 0.02
_FAILURES = 3
"""Failures in a row after which a server is restarted."""
_LONGEST_PAUSE_S = 30.0
_ATTEMPTS = 10
"""A request that fails so often fails the run."""


class Fleet:
    """The servers of `kind` in `registry`; lives in one event loop between `open` and `close`.

    `tell` is given a line for whatever a user should know of. `count` of the config is how many there are at the start;
    more may come. A reply with an id beyond `vocabulary` is refused, and so is one whose text is not that of its ids
    by `text_check`.
    """

    text_check: TextCheck | None = None

    def __init__(
        self,
        registry: Registry,
        config: ServerConfig,
        kind: str = "policy",
        router: RouterClient | None = None,
        tell: Callable[[str], None] = lambda text: None,
        vocabulary: int | None = None,
    ):
        self._registry = registry
        self._config = config
        self._kind = kind
        self._tell = tell
        self._router = router
        self._vocabulary = vocabulary
        if router is not None:
            router.vocabulary = vocabulary
        self._routed: set[str] = set()
        """The servers that were registered with the router."""
        self._routing = asyncio.Lock()
        self._searching = asyncio.Lock()
        self._lending = asyncio.Lock()
        self._members: dict[str, Member] = {}
        self._prepared: list[Member] = []
        self._version: str | None = None
        self._go = asyncio.Event()
        self._go.set()
        self._why = "none has registered"
        self._dry_since = 0.0
        self._unexplained = 0
        self._lost = 0
        self._memory = FleetMemory(registry, kind)
        self._watching: asyncio.Task | None = None

    async def open(self) -> None:
        """Return when `count` servers have registered and are ours; ServerError where they have not in time."""
        loop = asyncio.get_running_loop()
        # A run before this one may have ended while its servers slept.
        self._let_start()
        self._dry_since = loop.time()
        if self._router is not None:
            self._router.text_check = self.text_check
            await self._router.__aenter__()
        self._watching = loop.create_task(self._watch())
        while len(self._in("joining")) < self._config.count:
            self._check_watch()
            if loop.time() - self._dry_since > self._config.start_deadline_s:
                here = ", ".join(member.server.name for member in self._in("joining")) or "none"
                raise ServerError(
                    f"{self._config.count} {self._kind} servers were to register in {self._registry.directory} within "
                    f"start_deadline_s ({self._config.start_deadline_s:g} s), but {here} did; last: {self._why}"
                )
            await asyncio.sleep(_POLL_S)

    def take_metrics(self) -> dict[str, float]:
        """Return how many servers answer requests now, and how often one was lost since the last call.

        A server is lost where it fails a request or a check, and where it is no longer registered.
        """
        lost, self._lost = self._lost, 0
        return {"servers/serving": float(len(self._in("serving"))), "servers/lost": float(lost)}

    async def close(self) -> None:
        """Leave all servers."""
        if self._watching is not None:
            self._watching.cancel()
        if self._router is not None:
            await self._router.__aexit__()
        for member in self._members.values():
            await member.client.__aexit__()

    async def ask[T](self, home: int, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """What `call` returns for one of the serving servers: number `home`, modulo their number, as a rule.

        Where it raises ServerError that server is out, and another is asked. Waits while `hold` is on, and while no
        server serves. Raises RequestRefused as `call` does, and ServerError where there has been no server for
        start_deadline_s, or `call` has failed too often, be it at different servers.
        """
        attempts = 0
        if self._router is not None:
            return await self._ask_router(call)
        while True:
            member = await self._serving(home)
            task = asyncio.ensure_future(call(member.client))
            member.running.add(task)
            try:
                answer = await task
                member.failures = 0
                return answer
            except RequestRefused:
                raise
            except ServerError as error:
                attempts += 1
                if member.state != "out":
                    self._put_out(member, str(error))
                if attempts == _ATTEMPTS:
                    raise
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():
                    raise
            finally:
                member.running.discard(task)

    async def _ask_router[T](self, call: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
        """`ask`, where the router chooses the server."""
        for attempt in range(_ATTEMPTS):
            await self._serving(0)
            try:
                return await call(self._router)
            except RequestRefused:
                raise
            except ServerError as error:
                if attempt + 1 == _ATTEMPTS:
                    raise
                await self._find_culprits(error)
                await asyncio.sleep(_POLL_S * attempt)

    async def wait_for(self, work: Future, patience_s: float) -> Literal["done", "weights", "nothing"]:
        """Wait up to `patience_s` seconds for `work`, which sends requests to these servers.

        Returns `done`, `nothing` after the timeout, or `weights` where the work cannot continue before a weight
        update: no server is serving, and one that has started needs weights.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + patience_s
        while not work.done():
            if not self._in("serving") and self._in("joining"):
                return "weights"
            if loop.time() > until:
                return "nothing"
            await asyncio.sleep(_ATTEND_S)
        return "done"

    @property
    def clients(self) -> list[SGLangClient]:
        """Of the servers that were prepared for the last sync."""
        return [member.client for member in self._prepared]

    async def pause_generation(self, mode: Literal["retract", "in_place"]) -> None:
        """Pause the requests in flight where they are, and hold back new ones."""
        self._go.clear()
        await self._all_tried(lambda client: client.pause(mode))

    async def continue_generation(self) -> None:
        """Continue paused requests, and send the ones that were held back."""
        await self._all_tried(lambda client: client.continue_())
        self._go.set()

    async def sleep(self) -> bool:
        """Let all servers give up their memory; whether they can: on a CPU they cannot, and are not asked.

        Returns when no registered server has any, and none is starting. Raises ServerError naming those that still have
        some after start_deadline_s.
        """
        if not uses_cuda():
            return False
        # Memory that was given up comes back with any content, so the same version has to be sent again.
        self._version = None
        self._memory.sleep()
        await self._let_match()
        until = asyncio.get_running_loop().time() + self._config.start_deadline_s
        while holders := await self._memory.holders(self._members):
            self._check_watch()
            if asyncio.get_running_loop().time() > until:
                raise ServerError(
                    f"{', '.join(holders)} did not give up memory for the trainer within start_deadline_s "
                    f"({self._config.start_deadline_s:g} s); see the server's log, and continue with --resume. The "
                    f"last to leave: {self._why}"
                )
            await asyncio.sleep(_POLL_S)
        return True

    async def wake(self, tag: str) -> None:
        """Let all servers that have given up their `tag` take it again; when they have all, others may start."""
        self._memory.wake(tag)
        await self._let_match()
        if self._memory.awake:
            self._let_start()

    async def lend(self, model: Path, version: str, deadline_s: float) -> None:
        """Let the serving servers hold the weights in directory `model`, as `version`, until others are sent.

        Whatever they were asked before is ended. A server that does not take them is out.
        """

        async def take(client: SGLangClient) -> None:
            await client.take_over(deadline_s=self._config.answer_deadline_s)
            await client.update_from_disk(model, version, deadline_s=deadline_s)

        async with self._lending:
            if version != self._version:
                self._version = version
                await self._all_tried(take)
                await self._route()

    @property
    def version(self) -> str | None:
        """Of the weights that the servers were given last; None where that failed."""
        return self._version

    @property
    def serves(self) -> bool:
        """Whether there is a server that may be asked."""
        return bool(self._in("serving"))

    async def check_served(self) -> None:
        """Ask every serving server which weights it serves: one that has others than were sent to it is out.

        Raises WeightsReplaced where none is left then. Does nothing while no weights are known to be there.
        """
        replaced: list[WeightsReplaced] = []

        async def check(client: SGLangClient) -> None:
            try:
                await client.check_served(self._version, deadline_s=self._config.answer_deadline_s)
            except WeightsReplaced as error:
                replaced.append(error)
                raise

        async with self._lending:
            if self._version is not None:
                await self._all_tried(check)
        if replaced and not self._in("serving", "joining"):
            raise WeightsReplaced(f"{replaced[0]} No other server is left; find out who did it, then use --resume.")

    async def prepare(self, version: str) -> bool:
        """Whether weights must be pushed to `clients`, since one of them does not have `version`.

        Waits for a server where there is none. Raises ServerError where none comes within start_deadline_s.
        """
        while not self._in("serving", "joining"):
            # It starts beside the policy's weights, of which it is to get a copy.
            self._let_start()
            await self._next_change()
        if version == self._version and not self._in("joining"):
            return False
        self._prepared = self._in("serving", "joining")
        return True

    async def commit(self, version: str) -> None:
        """Record that the servers that were prepared hold `version`, as their answers show."""
        self._version = version
        self._unexplained = 0
        for member in self._prepared:
            if member.state == "joining":
                member.state = "serving"
        await self._route()

    async def abort(self, error: ServerError) -> None:
        """Handle a failed push: servers that answer a probe are joining again, the others are out.

        Raises `error` where the push fails again although all servers are healthy.
        """
        self._version = None
        for member in self._prepared:
            if member.state != "out":
                member.state = "joining"
                member.release()
        await asyncio.gather(*(self._take_over(member) for member in self._prepared if member.state == "joining"))
        if all(member.state == "joining" for member in self._prepared):
            self._unexplained += 1
            if self._unexplained > 1:
                raise error
        self._tell(f"weights did not arrive and are sent again: {_first_line(str(error))}")

    async def _route(self) -> None:
        """Let the router ask the servers that serve, and no other; if there is a router.

        Raises ServerError where it does not within start_deadline_s.
        """
        if self._router is None:
            return
        async with self._routing:
            urls = {member.server.url for member in self._in("serving")}
            await self._router.route_to(urls, self._config.start_deadline_s)
            self._routed = urls

    async def _find_culprits(self, error: ServerError) -> None:
        """A request failed through the router: who does not answer, or has other weights than it should, is out."""

        async def check(client: SGLangClient) -> None:
            await client.check_served(self._version, deadline_s=self._config.answer_deadline_s)
            await client.health(deadline_s=self._config.answer_deadline_s)

        if self._searching.locked():
            async with self._searching:
                return
        async with self._searching:
            # A server that is held does not answer.
            await self._go.wait()
            self._tell(f"a request failed: {_first_line(str(error))}")
            await self._all_tried(check)
            await self._route()

    def _in(self, *states: str) -> list[Member]:
        """By name."""
        members = (self._members[name] for name in sorted(self._members))
        return [member for member in members if member.state in states]

    async def _serving(self, home: int) -> Member:
        while True:
            self._check_watch()
            await self._go.wait()
            serving = self._in("serving")
            if serving:
                return serving[home % len(serving)]
            await self._next_change()

    async def _next_change(self) -> None:
        """Wait a little. Raises ServerError where there has been no server for start_deadline_s."""
        self._check_watch()
        if asyncio.get_running_loop().time() - self._dry_since > self._config.start_deadline_s:
            raise ServerError(
                f"There has been no {self._kind} server for start_deadline_s ({self._config.start_deadline_s:g} s); "
                f"continue with --resume. The last to leave: {self._why}"
            )
        await asyncio.sleep(_POLL_S)

    def _check_watch(self) -> None:
        """Raise what ended the watch over the registry."""
        if self._watching.done():
            try:
                self._watching.result()
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _watch(self) -> None:
        """Follow the registry, and try those that are out."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tries:
            while True:
                registered = [s for s in await asyncio.to_thread(self._registry.all) if s.kind == self._kind]
                for sentence in self._registry.complaints():
                    self._tell(sentence)
                await self._follow({server.name: server for server in registered})
                for member in self._members.values():
                    if member.state == "out" and loop.time() >= member.next_try:
                        member.next_try = math.inf
                        tries.create_task(self._take_over(member))
                if self._routed - {member.server.url for member in self._in("serving")} and not self._routing.locked():
                    tries.create_task(self._route())
                if self._in("serving", "joining"):
                    self._dry_since = loop.time()
                await asyncio.sleep(_POLL_S)

    async def _follow(self, registered: dict[str, RegisteredServer]) -> None:
        for name, member in list(self._members.items()):
            if registered.get(name) != member.server:
                self._why = f"{name} ({member.server.url}) is not registered any more"
                self._tell(self._why)
                del self._members[name]
                self._lost += member.state != "out"
                member.state = "out"
                member.release()
                await member.client.__aexit__()
        for name, server in registered.items():
            if name not in self._members:
                headers = self._registry.authorization(server)
                member = Member(server, self._config.request_deadline_s, headers)
                member.client.vocabulary, member.client.text_check = self._vocabulary, self.text_check
                await member.client.__aenter__()
                self._members[name] = member
                if (sentence := nccl_difference(server, self._config)) is not None:
                    self._tell(sentence)

    async def _take_over(self, member: Member) -> None:
        """End what an earlier run, or this one, may have left in flight there: then it can join."""
        deadline_s = self._config.answer_deadline_s
        if not await self._tried(member, lambda client: client.take_over(deadline_s=deadline_s)):
            return
        if await self._matches(member):
            member.state = "joining"

    async def _let_match(self) -> None:
        """All servers take, or give up, the memory that they should."""
        await asyncio.gather(*(self._matches(member) for member in self._in("serving", "joining")))

    async def _matches(self, member: Member) -> bool:
        """Whether the server has the memory that it should, which may change meanwhile; else it is out."""
        while (order := self._memory.order(member)) is not None:
            if not await self._tried(member, order):
                return False
        return True

    def _let_start(self) -> None:
        """Let servers start that were kept from it, and wait for them as for those of the start."""
        if self._memory.let_start():
            self._dry_since = asyncio.get_running_loop().time()

    async def _all_tried(self, call: Order) -> None:
        """Who serves does as it is asked, or is out."""
        await asyncio.gather(*(self._tried(member, call) for member in self._in("serving")))

    async def _tried(self, member: Member, call: Order) -> bool:
        """Whether the server did as it was asked; else it is out."""
        try:
            await call(member.client)
        except ServerError as error:
            self._put_out(member, str(error))
            return False
        return self._members.get(member.server.name) is member

    def _put_out(self, member: Member, why: str) -> None:
        """Nothing more is asked of this server before it is taken over."""
        if self._members.get(member.server.name) is not member:
            return
        self._why = why
        self._tell(f"{member.server.name} is out: {_first_line(why)}")
        self._lost += member.state != "out"
        member.state = "out"
        member.failures += 1
        pause_s = min(2.0 ** (member.failures - 1), _LONGEST_PAUSE_S)
        member.next_try = asyncio.get_running_loop().time() + pause_s
        if member.failures >= _FAILURES:
            self._registry.ask_restart(member.server)
        member.release()


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
