"""Brings the policy's weights to the sampling servers, and proves that they arrived."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence

from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.policy.policy import Policy
from exprl_megatron.resharding.transport import Bucket, Transport
from exprl_megatron.serving.checksums import checksums, differing
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.command import has_cuda
from exprl_megatron.training.conductor import Conductor

_MB = 2**20


class WeightSync:
    """Knows which version the servers hold; every rank calls `bring`, the conductor alone talks to servers."""

    def __init__(
        self,
        config: SyncConfig,
        policy: Policy,
        conductor: Conductor,
        clients: Sequence[SGLangClient],
        transport: Transport | None,
    ):
        self._config = config
        self._policy = policy
        self._conductor = conductor
        self._clients = clients
        self._transport = transport
        self._served: str | None = None

    def bring(self, version: str) -> None:
        """Make every server hold the policy's current weights as `version`, where it does not yet.

        Raises ServerError where a server refuses, dies, hangs, or afterwards holds other bytes than the trainer.
        """
        if version == self._served:
            return
        buckets = self._policy.hf_buckets(int(self._config.bucket_mb * _MB))
        self._conductor.collective(lambda: self._push(buckets, version), lambda: _exhaust(buckets))
        self._served = version

    async def close(self) -> None:
        """Leave the servers' broadcast group; rank 0 only."""
        if self._transport is not None:
            await self._transport.close()

    def _push(self, buckets: Iterable[Bucket], version: str) -> None:
        expected: dict[str, str] = {}
        observed = self._hashed(buckets, expected) if self._config.verify else buckets
        self._conductor.run(self._transport.push(observed, version))
        if self._config.verify:
            self._conductor.run(verify(self._clients, expected, version))

    def _hashed(self, buckets: Iterable[Bucket], found: dict[str, str]) -> Iterator[Bucket]:
        """The buckets as they are; their checksums are added to `found` as they pass."""
        tied = self._policy.architecture.tied
        server = "cuda" if has_cuda() else "cpu"
        for bucket in buckets:
            found |= checksums(bucket, tied=tied, server=server)
            yield bucket


async def verify(clients: Sequence[SGLangClient], expected: dict[str, str], version: str) -> None:
    """Compare what each server holds with the trainer's checksums.

    Raises ServerError naming the server and the first tensors that differ.
    """
    for client, ranks in zip(clients, await asyncio.gather(*(c.checksums() for c in clients)), strict=True):
        for held in ranks:
            wrong = differing(held, expected)
            if wrong:
                raise ServerError(
                    f"{client.name} does not hold the weights of {version} after the sync: {len(wrong)} of "
                    f"{len(expected)} tensors differ, first {', '.join(wrong[:3])}; nothing more was sampled from it, "
                    "go on with --resume."
                )


def _exhaust(buckets: Iterable[Bucket]) -> None:
    for _ in buckets:
        pass
