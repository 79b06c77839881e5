"""Brings the policy's weights to the sampling servers, and proves that they arrived."""

import time
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import torch

from exprl_megatron.accelerator import uses_cuda
from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.conversion import fp8 as blocks
from exprl_megatron.errors import ServerError, WeightsDiffer
from exprl_megatron.policy.policy import Policy
from exprl_megatron.resharding.control import Control, SyncStopped
from exprl_megatron.resharding.outgoing import Outgoing
from exprl_megatron.resharding.timing import SyncTimes
from exprl_megatron.resharding.transport import Bucket, Transport
from exprl_megatron.serving.checksums import ServerChecksums, differing
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.together import together
from exprl_megatron.training.conductor import Conductor, ConductorFailed

_MB = 2**20


class Members(Protocol):
    """The servers that get weights, as rank 0 knows them: a Fleet, or FixedServers."""

    clients: list[SGLangClient]
    """Of those that were convoked last."""

    async def convoke(self, version: str) -> bool:
        """Whether weights are to be brought to `clients`, since one of them has not `version`."""

    async def brought(self, version: str) -> None:
        """They have it now."""

    async def failed(self, error: ServerError) -> None:
        """Bringing it failed; returns where it is to be tried again, with whoever is convoked then, else raises."""


class WeightSync:
    """Every rank calls `bring`; the conductor alone talks to servers, and it alone needs `members`."""

    def __init__(
        self,
        config: SyncConfig,
        policy: Policy,
        conductor: Conductor,
        members: Members,
        transport: Transport,
        control: Control,
        server_tp: int = 1,
    ):
        self._config = config
        self._policy = policy
        self._conductor = conductor
        self._members = members
        self._transport = transport
        self._control = control
        self._server_tp = server_tp
        self._enlisted: list[SGLangClient] | None = None
        """The servers that the transport brings weights to, on rank 0; None where it must be told."""

    def bring(self, version: str) -> dict[str, float]:
        """Make every server hold the policy's current weights as `version`, where it does not yet.

        Where a server fails meanwhile it is done again with those that are left, or have come. What the parts took, on
        rank 0 (see SyncTimes); nothing where there was nothing to do, and on other ranks. Raises ServerError where no
        server is left or all fail twice, WeightsDiffer where one afterwards holds other bytes than the trainer.
        """
        while (to_do := self._conductor.everywhere(lambda: self._conductor.run(self._convoked(version)))) != "nothing":
            if to_do == "enlist":
                self._enlist()
            times, error = self._attempt(version)
            if self._conductor.everywhere(lambda e=error: self._conductor.run(self._settled(version, e))):
                return times.metrics() if self._conductor.here else {}
        return {}

    def close(self) -> None:
        """Leave the groups that are shared with servers; every rank calls it.

        A server that died after the last sync is left behind: the weights are needed nowhere any more.
        """

        def leave() -> None:
            with suppress(ServerError):
                self._conductor.run(self._transport.close())

        self._conductor.collective(leave, self._transport.follow_close)

    def _outgoing(self, sums: ServerChecksums | None) -> Outgoing:
        """The policy's current weights; what this rank fills of them is added to `sums`."""
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
            check=None if sums is None else lambda bucket: sums.add(as_served(bucket)),
        )

    def _checksums(self) -> ServerChecksums | None:
        """Of weights that servers are to hold; None where nobody compares them."""
        architecture = self._policy.architecture
        if not self._config.verify:
            return None
        return ServerChecksums(
            tp=self._server_tp,
            kv_heads=architecture.kv_groups,
            experts=architecture.experts.count if architecture.experts else 0,
            tied=architecture.tied,
            server="cuda" if uses_cuda() else "cpu",
        )

    async def _convoked(self, version: str) -> str:
        """`nothing` to be done, weights to be `push`ed, or first the transport's servers to be `enlist`ed."""
        if not await self._members.convoke(version):
            return "nothing"
        return "push" if self._members.clients == self._enlisted else "enlist"

    def _enlist(self) -> None:
        clients = list(self._members.clients) if self._conductor.here else []
        try:
            self._transport.enlist(clients)
        except SyncStopped as stopped:
            raise ConductorFailed from stopped
        self._enlisted = clients

    def _attempt(self, version: str) -> tuple[SyncTimes, Exception | None]:
        """What one push took, and on rank 0 what it failed of; the other ranks stop without a word."""
        times, sums = SyncTimes(), self._checksums()
        outgoing = self._outgoing(sums)
        times.nbytes = outgoing.nbytes
        try:
            self._conductor.collective(
                lambda: self._push(outgoing, version, times), lambda: self._transport.follow(outgoing)
            )
            self._check(outgoing, sums, version, times)
        except SyncStopped:
            return times, None
        except Exception as error:
            if not self._conductor.here:
                raise
            return times, error
        finally:
            outgoing.checked()
        return times, None

    def _check(self, outgoing: Outgoing, sums: ServerChecksums | None, version: str, times: SyncTimes) -> None:
        """Compare checksums, where the config says so, and put all ranks' times together; a collective."""
        pushed = time.monotonic()
        asking = None
        if self._conductor.here and sums is not None:
            # Servers compute theirs while the trainer does.
            asking = self._conductor.start(held_checksums(self._members.clients, self._config.deadline_s))
        outgoing.gather_rest()
        outgoing.checked()
        found = self._control.collect((outgoing.gather_s, outgoing.quantise_s, sums and sums.result()))
        if found is None:
            return
        gathering, quantising, every_rank_s = zip(*found, strict=True)
        times.gather_s, times.quantise_s = max(gathering), max(quantising)
        if sums is not None:
            expected = [dict(ChainMap(*parts)) for parts in zip(*every_rank_s, strict=True)]
            compare(self._members.clients, asking.result(), expected, version)
        times.check_s = time.monotonic() - pushed

    async def _settled(self, version: str, error: Exception | None) -> bool:
        """Whether the servers hold `version`; raises `error` where another attempt is of no use."""
        if error is None:
            await self._members.brought(version)
            return True
        if not isinstance(error, ServerError) or isinstance(error, WeightsDiffer):
            raise error
        await self._members.failed(error)
        # What the transport shares with its servers may be broken.
        self._enlisted = None
        return False

    def _push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        started = time.monotonic()
        self._conductor.run(self._transport.push(outgoing, version, times))
        times.push_s = time.monotonic() - started


def as_served(bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """What a server's checksums are of: for matrices in FP8 blocks the bf16 numbers that they stand for."""
    scales = {name: tensor for name, tensor in bucket if name.endswith(blocks.SCALE)}
    for name, tensor in bucket:
        if name + blocks.SCALE in scales:
            yield name, blocks.dequantise(tensor, scales[name + blocks.SCALE]).bfloat16()
        elif name not in scales:
            yield name, tensor


async def held_checksums(clients: Sequence[SGLangClient], deadline_s: float) -> list[tuple[dict[str, str], ...]]:
    """Of what each tensor-parallel rank of each server holds."""
    return await together(client.checksums(deadline_s=deadline_s) for client in clients)


def compare(
    clients: Sequence[SGLangClient],
    held: Sequence[Sequence[Mapping[str, str]]],
    expected: Sequence[Mapping[str, str]],
    version: str,
) -> None:
    """Compare what each server's ranks hold with the trainer's checksums for them.

    Raises WeightsDiffer naming the server and the first tensors that differ.
    """
    for client, ranks in zip(clients, held, strict=True):
        for own, wanted in zip(ranks, expected, strict=True):
            wrong = differing(own, wanted)
            if wrong:
                raise WeightsDiffer(
                    f"{client.name} does not hold the weights of {version} after the sync: {len(wrong)} of "
                    f"{len(wanted)} tensors differ, first {', '.join(wrong[:3])}; nothing more was sampled from it, "
                    "go on with --resume."
                )
