"""What every way of bringing weights to the sampling servers has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from exprl_megatron.serving.client import SGLangClient
    from exprl_megatron.weight_sync.outgoing import Outgoing
    from exprl_megatron.weight_sync.timing import SyncTimes


class Transport(Protocol):
    """Brings one version of the weights to all sampling servers. Every rank has one; rank 0 alone talks to servers."""

    fillers: tuple[tuple[int, ...], ...] | None
    """The ranks on which messages are wanted, those of a machine together (see Outgoing)."""

    def enlist(self, clients: Sequence[SGLangClient]) -> None:
        """From now on bring weights to these servers (needed on rank 0 alone); a collective.

        What was shared with those before is given up, as it must be when a push has failed.
        """

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory for a bucket, [nbytes] uint8, of the kind that this transport sends from."""

    async def push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        """Send all rounds of `outgoing`; when this returns, every server serves them as `version`. Rank 0 only.

        Adds to `times` what sending and loading took. Raises ServerError where a server refuses, dies or hangs; the
        ranks that follow then end with SyncStopped.
        """

    def follow(self, outgoing: Outgoing) -> None:
        """The other ranks' part in push. Raises SyncStopped where rank 0 met an error."""

    async def close(self) -> None:
        """Leave the servers as they were found, apart from the weights; rank 0 only."""

    def follow_close(self) -> None:
        """The other ranks' part in close."""
