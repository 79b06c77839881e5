"""Checks tensor by tensor that servers hold the trainer's weights after a sync."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import numpy as np
import torch

from exprl_megatron.errors import WeightsDiffer
from exprl_megatron.models import fp8_blocks as blocks
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Bucket
from exprl_megatron.serving.checksums import ServerChecksums, differing
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.shard_checksums import ShardChecksums
from exprl_megatron.weight_sync.weight_exporter import BucketCheck, WeightExporter

RankChecksums = Sequence[Mapping[str, str]]
"""Of each tensor-parallel rank of a server, by the names of its parameters."""


class WeightCheck(Protocol):
    """One sync's check. Every rank makes one before the push."""

    @property
    def bucket_check(self) -> BucketCheck | None:
        """What WeightExporter calls for every message."""

    def begin(self, exporter: WeightExporter) -> None:
        """Prepare the check; called before the push."""

    def own(self, exporter: WeightExporter) -> Any:
        """Return this rank's part of the expected checksums, after the push; a collective."""

    def expected(self, parts: Sequence[Any]) -> RankChecksums:
        """Return the checksums that each server's ranks should have, from all ranks' parts; rank 0 only."""

    async def held(self, clients: Sequence[SGLangClient]) -> Sequence[RankChecksums]:
        """Return the checksums of each server's ranks; rank 0 only, after the push."""

    def end(self) -> None:
        """Return when nothing reads the weights any more, also where the push failed."""


class ShardCheck:
    """A WeightCheck by `ShardChecksums`, for servers that have exprl's loader."""

    bucket_check = None

    def __init__(self, shards: ShardChecksums):
        self._shards = shards
        self._hashing: Future[np.ndarray] | None = None
        self._dtype: torch.dtype | None = None

    def begin(self, exporter: WeightExporter) -> None:
        """Prepare the check, before the push."""
        self._dtype = exporter.gatherer.dtype
        self._hashing = self._shards.begin(exporter.gatherer)

    def own(self, exporter: WeightExporter) -> np.ndarray:
        """Return this rank's sums, uint64 [count]; waits for the hashing that `begin` started."""
        return required(self._hashing, "the hashing that begin starts").result()

    def expected(self, parts: Sequence[np.ndarray]) -> RankChecksums:
        """Return the checksums that each server's ranks should have, from all ranks' sums, uint64 [count] each; rank 0
        only.
        """
        return self._shards.expected(parts)

    async def held(self, clients: Sequence[SGLangClient]) -> Sequence[RankChecksums]:
        """Return the checksums of each server's ranks, after the push; rank 0 only."""
        return await self._shards.held(clients, required(self._dtype, "the dtype that begin reads"))

    def end(self) -> None:
        """Return when nothing reads the weights any more."""
        if self._hashing is not None:
            wait([self._hashing])


class WholeCheck:
    """A WeightCheck by SGLang's own checksums of joined tensors, for any server and for FP8."""

    def __init__(self, architecture: Architecture, server_tp: int, deadline_s: float):
        self._deadline_s = deadline_s
        self._sums = ServerChecksums(
            tp=server_tp,
            kv_heads=architecture.kv_groups,
            experts=architecture.experts.count if architecture.experts else 0,
            sigmoid_router=architecture.experts is not None and architecture.experts.sigmoid,
            tied=architecture.tied,
            server="cuda" if uses_cuda() else "cpu",
            delta_net=architecture.delta_net,
        )

    def bucket_check(self, bucket: Bucket) -> None:
        """Add the tensors of a bucket to the checksums, with FP8 blocks dequantized to bf16."""
        self._sums.add(to_served_dtypes(bucket))

    def begin(self, exporter: WeightExporter) -> None:
        """Prepare the check, before the push."""
        return None

    def own(self, exporter: WeightExporter) -> tuple[dict[str, str], ...]:
        """Return this rank's part of the expected checksums, after the push; a collective."""
        exporter.drain()
        exporter.wait_checks()
        return self._sums.result()

    def expected(self, parts: Sequence[tuple[dict[str, str], ...]]) -> RankChecksums:
        """Return the checksums that each server's ranks should have, from all ranks' parts; rank 0 only."""
        return [dict(ChainMap(*ranks)) for ranks in zip(*parts, strict=True)]

    async def held(self, clients: Sequence[SGLangClient]) -> Sequence[RankChecksums]:
        """Return the checksums of each server's ranks, after the push; rank 0 only."""
        return await held_checksums(clients, self._deadline_s)

    def end(self) -> None:
        """Return when nothing reads the weights any more."""
        return None


def to_served_dtypes(bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a server's checksums cover: for matrices in FP8 blocks their dequantized bf16 values, of
    the same shape.
    """
    scales = {name: tensor for name, tensor in bucket if name.endswith(blocks.SCALE)}
    for name, tensor in bucket:
        if name + blocks.SCALE in scales:
            yield name, blocks.dequantize(tensor, scales[name + blocks.SCALE]).bfloat16()
        elif name not in scales:
            yield name, tensor


async def held_checksums(clients: Sequence[SGLangClient], deadline_s: float) -> list[RankChecksums]:
    """Return SGLang's own checksums of what each tensor-parallel rank of each server holds."""
    return await gather_or_cancel(client.checksums(deadline_s=deadline_s) for client in clients)


def compare(
    clients: Sequence[SGLangClient],
    held: Sequence[RankChecksums],
    expected: RankChecksums,
    version: str,
) -> None:
    """Compare what each server's ranks hold with the trainer's checksums for them.

    Raises:
        WeightsDiffer: they differ; the error names the server and the first such tensors.
    """
    for client, ranks in zip(clients, held, strict=True):
        for own, wanted in zip(ranks, expected, strict=True):
            wrong = differing(own, wanted)
            if wrong:
                raise WeightsDiffer(
                    f"{client.name} does not hold the weights of {version} after the sync: {len(wrong)} of "
                    f"{len(wanted)} tensors differ, first {', '.join(wrong[:3])}; nothing more was sampled from it, "
                    "continue with --resume."
                )
