"""The interface of the transports, which push weights to the sampling servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from exprl_megatron.serving.client import SGLangClient
    from exprl_megatron.weight_sync.timing import SyncTimes
    from exprl_megatron.weight_sync.weight_exporter import WeightExporter


class Transport(Protocol):
    """Pushes a version of the weights to all sampling servers. Every rank has one; rank 0 alone talks to servers."""

    @property
    def source_ranks(self) -> tuple[tuple[int, ...], ...] | None:
        """The ranks that gather messages, grouped by machine (see WeightExporter)."""

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Push weights to these servers from now on (needed on rank 0 alone); a collective.

        Resources that are shared with the servers before are released, as is necessary after a failed push.
        """

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a bucket, [nbytes] uint8, in the memory that this transport sends from."""

    async def push(self, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        """Send all rounds of `exporter`; when this returns, every server serves them as `version`. Rank 0 only.

        Adds the times of sending and loading to `times`. Raises ServerError where a server refuses, dies or hangs; the
        other ranks then end with RankZeroFailed.
        """

    def follow(self, exporter: WeightExporter) -> None:
        """Take part in a push on the other ranks. Raises RankZeroFailed where rank 0 has an error."""

    async def close(self) -> None:
        """Release everything on the servers except the weights; rank 0 only."""

    def follow_close(self) -> None:
        """Take part in close on the other ranks."""
