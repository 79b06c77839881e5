"""Brings the policy's weights to the sampling servers, and proves that they arrived."""

import time
from contextlib import suppress
from typing import Protocol

from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.errors import ServerError, WeightsDiffer
from exprl_megatron.policy.policy import Policy
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.loader_commands import LOADER
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator, RankZeroFailed
from exprl_megatron.weight_sync.outgoing import Outgoing
from exprl_megatron.weight_sync.shard_checksums import ShardChecksums
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.transport import Transport
from exprl_megatron.weight_sync.weight_check import ShardCheck, WeightCheck, WholeCheck, compare

_MB = 2**20


class Members(Protocol):
    """The servers that receive weights, from rank 0's view: a ServerPool, or StaticPool."""

    clients: list[SGLangClient]
    """Clients of the servers that were prepared last."""

    async def prepare(self, version: str) -> bool:
        """Whether weights must be pushed to `clients`, since one of them does not have `version`."""

    async def commit(self, version: str) -> None:
        """Note that the prepared servers have `version` now."""

    async def abort(self, error: ServerError) -> None:
        """Handle a failed push: returns where it is to be repeated for the servers prepared then, else raises."""


class WeightSync:
    """Pushes the policy's weights to servers. Every rank calls it; only rank 0 talks to servers and needs `members`."""

    def __init__(
        self,
        config: SyncConfig,
        policy: Policy,
        coordinator: RankCoordinator,
        members: Members,
        transport: Transport,
        server_tp: int = 1,
    ):
        self._config = config
        self._policy = policy
        self._coordinator = coordinator
        self._members = members
        self._transport = transport
        self._server_tp = server_tp
        self._connected: list[SGLangClient] | None = None
        """The servers that the transport pushes weights to, on rank 0; None where it must be connected."""
        self._shards: ShardChecksums | None = None
        """Created at the first use."""
        self._have_loader: bool | None = None
        """Whether all of these servers have exprl's loader; None: not asked yet."""

    def push_weights(self, version: str) -> dict[str, float]:
        """Push the policy's current weights as `version` to every server that does not have them.

        After the failure of a server the push is repeated for the servers that are left or have joined. Returns the
        times of its parts on rank 0 (see SyncTimes), {} on other ranks and where no push was needed. Raises ServerError
        where no server is left or all fail twice, WeightsDiffer where a server then has other bytes than the trainer.
        """
        while (to_do := self._coordinator.broadcast_run(lambda: self._prepare(version))) != "nothing":
            if to_do == "connect":
                self._connect_transport()
            times, error = self._attempt(version)
            if self._coordinator.broadcast_run(lambda e=error: self._finish(version, e)):
                return times.metrics() if self._coordinator.is_rank0 else {}
        return {}

    def close(self) -> None:
        """Leave the process groups that are shared with servers; every rank calls it.

        The error of a server that died after the last sync is ignored: nothing needs the weights any more.
        """

        def leave() -> None:
            with suppress(ServerError):
                self._coordinator.run(self._transport.close())

        self._coordinator.run_collective(leave, self._transport.follow_close)

    def _outgoing(self, check: WeightCheck | None) -> Outgoing:
        """The policy's current weights; `check` sees what this rank fills of them."""
        config = self._config
        self._policy.gather_weights()
        return Outgoing(
            self._policy.chunks,
            self._policy.architecture,
            self._policy.world,
            int(config.bucket_mb * _MB),
            fillers=self._transport.fillers,
            fp8=config.fp8,
            allocate=self._transport.allocate,
            check=check and check.bucket_check,
        )

    async def _prepare(self, version: str) -> str:
        """`nothing` to be done, weights to be `push`ed, or first the transport's servers to be `connect`ed."""
        if not await self._members.prepare(version):
            return "nothing"
        return "push" if self._members.clients == self._connected else "connect"

    def _connect_transport(self) -> None:
        clients = list(self._members.clients) if self._coordinator.is_rank0 else []
        self._transport.connect(clients)
        self._connected = clients
        self._have_loader = None

    def _attempt(self, version: str) -> tuple[SyncTimes, Exception | None]:
        """What one push took, and on rank 0 what it failed of; the other ranks stop without a word."""
        times, check = SyncTimes(), self._new_check()
        outgoing = self._outgoing(check)
        times.nbytes = outgoing.nbytes
        try:
            if check is not None:
                check.begin(outgoing)
            self._coordinator.run_collective(
                lambda: self._push(outgoing, version, times), lambda: self._transport.follow(outgoing)
            )
            self._check(check, outgoing, version, times)
        except RankZeroFailed:
            return times, None
        except Exception as error:
            if not self._coordinator.is_rank0:
                raise
            return times, error
        finally:
            outgoing.checked()
            if check is not None:
                check.end()
        return times, None

    def _new_check(self) -> WeightCheck | None:
        """Of the next sync. Servers of which it is not known yet are believed to have exprl's loader."""
        if not self._config.verify:
            return None
        if self._config.fp8 or self._have_loader is False:
            return WholeCheck(self._policy.architecture, self._server_tp, self._config.deadline_s)
        if self._shards is None:
            self._shards = ShardChecksums(
                self._policy.architecture, self._policy.world, self._server_tp, self._config.deadline_s
            )
        return ShardCheck(self._shards)

    def _check(self, check: WeightCheck | None, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        """Compare checksums, where the config says so, and put all ranks' times together; a collective."""
        pushed, asking, own = time.monotonic(), None, None
        if isinstance(check, ShardCheck) and not self._servers_have_loader():
            check = self._new_check()
            outgoing = self._outgoing(check)
        if check is not None:
            if self._coordinator.is_rank0:
                # Servers compute theirs while the trainer does.
                asking = self._coordinator.start(check.held(self._members.clients))
            own = check.own(outgoing)
        found = self._coordinator.collect((outgoing.gather_s, outgoing.quantise_s, own))
        if found is None:
            return
        gathering, quantising, parts = zip(*found, strict=True)
        times.gather_s, times.quantise_s = max(gathering), max(quantising)
        if check is not None:
            compare(self._members.clients, asking.result(), check.expected(parts), version)
        times.check_s = time.monotonic() - pushed

    def _servers_have_loader(self) -> bool:
        """Whether all servers have exprl's loader; a collective. A request to another one's loader would end it."""
        if self._have_loader is None:
            self._have_loader = self._coordinator.broadcast_run(lambda: self._ask_for_loader())
        return self._have_loader

    async def _ask_for_loader(self) -> bool:
        loaders = await gather_or_cancel(client.loaders() for client in self._members.clients)
        return all(LOADER in names for names in loaders)

    async def _finish(self, version: str, error: Exception | None) -> bool:
        """Whether the servers hold `version`; raises `error` where another attempt is of no use."""
        if error is None:
            await self._members.commit(version)
            return True
        if not isinstance(error, ServerError) or isinstance(error, WeightsDiffer):
            raise error
        await self._members.abort(error)
        # What the transport shares with its servers may be broken.
        self._connected = None
        return False

    def _push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        started = time.monotonic()
        self._coordinator.run(self._transport.push(outgoing, version, times))
        times.push_s = time.monotonic() - started
