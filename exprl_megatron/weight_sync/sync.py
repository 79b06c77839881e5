"""Pushes the policy's weights to the sampling servers, and verifies by checksums that they arrived."""

import time
from contextlib import suppress
from functools import partial
from typing import Protocol

from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.errors import ServerError, WeightsDiffer
from exprl_megatron.policy.policy import Policy
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.loader_commands import LOADER
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator, RankZeroFailed
from exprl_megatron.weight_sync.shard_checksums import ShardChecksums
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.transport import Transport
from exprl_megatron.weight_sync.weight_check import ShardCheck, WeightCheck, WholeCheck, compare
from exprl_megatron.weight_sync.weight_exporter import WeightExporter

_MB = 2**20


class SyncTargets(Protocol):
    """The servers that receive weights, as seen by rank 0: a ServerPool or a StaticPool."""

    @property
    def clients(self) -> list[SGLangClient]:
        """Clients of the servers that were prepared last."""

    async def prepare(self, version: str) -> bool:
        """Return whether weights must be pushed to `clients`, since one of them does not have `version`."""

    async def commit(self, version: str) -> None:
        """Note that the prepared servers have `version` now."""

    async def abort(self, error: ServerError) -> None:
        """Handle a failed push: returns where it is to be repeated for the servers prepared then, else raises."""


class WeightSync:
    """Pushes the policy's weights to servers. Every rank calls it; only rank 0 talks to servers and needs `targets`."""

    def __init__(
        self,
        config: SyncConfig,
        policy: Policy,
        coordinator: RankCoordinator,
        targets: SyncTargets,
        transport: Transport,
        server_tp: int = 1,
    ):
        self._config = config
        self._policy = policy
        self._coordinator = coordinator
        self._targets = targets
        self._transport = transport
        self._server_tp = server_tp
        self._connected: list[SGLangClient] | None = None
        """The servers that the transport pushes weights to, on rank 0; None where it must be connected."""
        self._shards: ShardChecksums | None = None
        """Created at the first use."""
        self._have_loader: bool | None = None
        """Whether all connected servers have exprl's loader; None: not known yet."""

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
            if self._coordinator.broadcast_run(partial(self._finish, version, error)):
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

    def _exporter(self, check: WeightCheck | None) -> WeightExporter:
        """Return an exporter of the policy's current weights; `check` reads the messages that this rank fills."""
        config = self._config
        self._policy.gather_weights()
        return WeightExporter(
            self._policy.chunks,
            self._policy.architecture,
            self._policy.world,
            int(config.bucket_mb * _MB),
            source_ranks=self._transport.source_ranks,
            fp8=config.fp8,
            allocate=self._transport.allocate,
            check=None if check is None else check.bucket_check,
        )

    async def _prepare(self, version: str) -> str:
        """Return what is to be done: `nothing`, `push`, or `connect` the transport to the servers first."""
        if not await self._targets.prepare(version):
            return "nothing"
        return "push" if self._targets.clients == self._connected else "connect"

    def _connect_transport(self) -> None:
        clients = list(self._targets.clients) if self._coordinator.is_rank0 else []
        self._transport.connect(clients)
        self._connected = clients
        self._have_loader = None

    def _attempt(self, version: str) -> tuple[SyncTimes, Exception | None]:
        """Push once; returns its times and, on rank 0, its error. The other ranks return no error."""
        times, check = SyncTimes(), self._new_check()
        exporter = self._exporter(check)
        times.nbytes = exporter.nbytes
        try:
            if check is not None:
                check.begin(exporter)
            self._coordinator.run_collective(
                lambda: self._push(exporter, version, times), lambda: self._transport.follow(exporter)
            )
            self._check(check, exporter, version, times)
        except RankZeroFailed:
            return times, None
        except Exception as error:
            if not self._coordinator.is_rank0:
                raise
            return times, error
        finally:
            exporter.wait_checks()
            if check is not None:
                check.end()
        return times, None

    def _new_check(self) -> WeightCheck | None:
        """Return the check of the next sync. Servers are assumed to have exprl's loader until they were asked."""
        if not self._config.verify:
            return None
        if self._config.fp8 or self._have_loader is False:
            return WholeCheck(self._policy.architecture, self._server_tp, self._config.deadline_s)
        if self._shards is None:
            self._shards = ShardChecksums(
                self._policy.architecture, self._policy.world, self._server_tp, self._config.deadline_s
            )
        return ShardCheck(self._shards)

    def _check(self, check: WeightCheck | None, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        """Compare checksums, where the config enables it, and combine all ranks' times; a collective."""
        pushed, asking, own = time.monotonic(), None, None
        if isinstance(check, ShardCheck) and not self._servers_have_loader():
            check = self._new_check()
            exporter = self._exporter(check)
        if check is not None:
            if self._coordinator.is_rank0:
                # Servers compute their checksums while the trainer computes its own.
                asking = self._coordinator.start(check.held(self._targets.clients))
            own = check.own(exporter)
        found = self._coordinator.collect((exporter.gather_s, exporter.quantize_s, own))
        if found is None:
            return
        gathering, quantizing, parts = zip(*found, strict=True)
        times.gather_s, times.quantize_s = max(gathering), max(quantizing)
        if check is not None:
            compare(
                self._targets.clients,
                required(asking, "the servers' checksums").result(),
                check.expected(parts),
                version,
            )
        times.check_s = time.monotonic() - pushed

    def _servers_have_loader(self) -> bool:
        """Return whether all servers have exprl's loader; a collective. A request to another one's loader would
        end it.
        """
        if self._have_loader is None:
            self._have_loader = self._coordinator.broadcast_run(lambda: self._ask_for_loader())
        return self._have_loader

    async def _ask_for_loader(self) -> bool:
        loaders = await gather_or_cancel(client.loaders() for client in self._targets.clients)
        return all(LOADER in names for names in loaders)

    async def _finish(self, version: str, error: Exception | None) -> bool:
        """Return whether the servers hold `version`; raises `error` where it is pointless to repeat the push."""
        if error is None:
            await self._targets.commit(version)
            return True
        if not isinstance(error, ServerError) or isinstance(error, WeightsDiffer):
            raise error
        await self._targets.abort(error)
        # The groups that the transport shares with its servers may be broken.
        self._connected = None
        return False

    def _push(self, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        started = time.monotonic()
        self._coordinator.run(self._transport.push(exporter, version, times))
        times.push_s = time.monotonic() - started
