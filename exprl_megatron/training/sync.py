"""Brings the policy's weights to the sampling servers, and proves that they arrived."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial

from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.conversion import fp8 as blocks
from exprl_megatron.errors import ServerError
from exprl_megatron.policy.policy import Policy
from exprl_megatron.resharding.control import Control, SyncStopped
from exprl_megatron.resharding.outgoing import Outgoing
from exprl_megatron.resharding.timing import SyncTimes
from exprl_megatron.resharding.transport import Bucket, Transport
from exprl_megatron.serving.checksums import differing, rank_checksums
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.command import has_cuda
from exprl_megatron.training.conductor import Conductor, ConductorFailed

_MB = 2**20


class WeightSync:
    """Knows which version the servers hold; every rank calls `bring`, the conductor alone talks to servers."""

    def __init__(
        self,
        config: SyncConfig,
        policy: Policy,
        conductor: Conductor,
        clients: Sequence[SGLangClient],
        transport: Transport,
        control: Control,
        server_tp: int = 1,
    ):
        self._config = config
        self._policy = policy
        self._conductor = conductor
        self._clients = clients
        self._transport = transport
        self._control = control
        self._server_tp = server_tp
        self._served: str | None = None

    def bring(self, version: str) -> dict[str, float]:
        """Make every server hold the policy's current weights as `version`, where it does not yet.

        What the parts took, on rank 0 (see SyncTimes); nothing where there was nothing to do, and on other ranks.
        Raises ServerError where a server refuses, dies, hangs, or afterwards holds other bytes than the trainer.
        """
        if version == self._served:
            return {}
        times, outgoing = SyncTimes(), self._outgoing()
        times.nbytes = outgoing.nbytes
        try:
            self._conductor.collective(
                lambda: self._push(outgoing, version, times), lambda: self._transport.follow(outgoing)
            )
        except SyncStopped as stopped:
            raise ConductorFailed from stopped
        pushed = time.monotonic()
        found = self._control.collect((outgoing.gather_s, outgoing.quantise_s, outgoing.checked()))
        self._served = version
        if found is None:
            return {}
        gathering, quantising, sums = zip(*found, strict=True)
        times.gather_s, times.quantise_s = max(gathering), max(quantising)
        if self._config.verify:
            expected = _merged(sums, self._server_tp)
            self._conductor.run(verify(self._clients, expected, version, self._config.deadline_s))
        times.check_s = time.monotonic() - pushed
        return times.metrics()

    async def close(self) -> None:
        """Leave the servers' broadcast groups; rank 0 only."""
        await self._transport.close()

    def _outgoing(self) -> Outgoing:
        """The policy's current weights, with the checksums that the servers will report for them."""
        config = self._config
        self._policy.gather_weights()
        check = None
        if config.verify:
            check = partial(
                expected_checksums,
                tp=self._server_tp,
                kv_heads=self._policy.architecture.kv_groups,
                tied=self._policy.architecture.tied,
            )
        return Outgoing(
            self._policy.chunks,
            self._policy.architecture,
            self._policy.world,
            int(config.bucket_mb * _MB),
            fillers=self._transport.fillers,
            fp8=config.fp8,
            allocate=self._transport.allocate,
            check=check,
        )

    def _push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        started = time.monotonic()
        self._conductor.run(self._transport.push(outgoing, version, times))
        times.push_s = time.monotonic() - started


def expected_checksums(bucket: Bucket, *, tp: int, kv_heads: int, tied: bool) -> tuple[dict[str, str], ...]:
    """What the tensor-parallel ranks of a server report for a bucket's tensors.

    For matrices in FP8 blocks a server reports the bf16 numbers that they stand for.
    """
    given = dict(bucket)
    values = {name: tensor for name, tensor in bucket if not name.endswith(blocks.SCALE)}
    for name in values:
        if name + blocks.SCALE in given:
            values[name] = blocks.dequantise(given[name], given[name + blocks.SCALE]).bfloat16()
    server = "cuda" if has_cuda() else "cpu"
    return rank_checksums(values.items(), tp=tp, kv_heads=kv_heads, tied=tied, server=server)


async def verify(
    clients: Sequence[SGLangClient], expected: Sequence[Mapping[str, str]], version: str, deadline_s: float
) -> None:
    """Compare what each tensor-parallel rank of each server holds with the trainer's checksums for it.

    Raises ServerError naming the server and the first tensors that differ.
    """
    answers = await asyncio.gather(*(client.checksums(deadline_s=deadline_s) for client in clients))
    for client, ranks in zip(clients, answers, strict=True):
        for held, wanted in zip(ranks, expected, strict=True):
            wrong = differing(held, wanted)
            if wrong:
                raise ServerError(
                    f"{client.name} does not hold the weights of {version} after the sync: {len(wrong)} of "
                    f"{len(wanted)} tensors differ, first {', '.join(wrong[:3])}; nothing more was sampled from it, "
                    "go on with --resume."
                )


def _merged(found: Sequence[Sequence[tuple[dict[str, str], ...]]], tp: int) -> list[dict[str, str]]:
    """The checksums of all trainer ranks' messages, for each rank of a server."""
    return [{k: v for messages in found for ranks in messages for k, v in ranks[rank].items()} for rank in range(tp)]
