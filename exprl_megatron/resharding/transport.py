"""What every way of bringing weights to the sampling servers has in common."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

Bucket = list[tuple[str, torch.Tensor]]
"""Full tensors under their Hugging Face names."""


class Transport(Protocol):
    """Brings one version of the weights to all sampling servers; used by the conductor alone."""

    async def push(self, buckets: Iterable[Bucket], version: str) -> None:
        """Send `buckets`; when this returns, every server serves them as `version`.

        Raises ServerError where a server refuses, dies or hangs.
        """

    async def close(self) -> None:
        """Leave the servers as they were found, apart from the weights."""


def with_last(buckets: Iterable[Bucket]) -> Iterator[tuple[Bucket, bool]]:
    """Each bucket, and whether it is the last one."""
    iterator = iter(buckets)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following
