"""Coordination of a sync by rank 0, so that a server's refusal ends every rank instead of leaving it in a collective.

Before each round of collectives every rank waits here for rank 0's signal, which is sent only while all servers have
answered without an error. The signal has its own gloo group on the hosts, whatever the weights are sent by.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from exprl_megatron.policy.sealed_objects import broadcast_object, gather_objects

CONDUCTOR = 0


class RankZeroFailed(Exception):
    """Rank 0 has an error, which it reports; the other ranks end silently."""


class Control:
    """Every rank makes one, with the same `deadline_s`, in the same order; a collective.

    A rank that hears nothing for `deadline_s` raises RuntimeError: rank 0 is then dead or hangs.
    """

    def __init__(self, deadline_s: float):
        self.here = dist.get_rank() == CONDUCTOR
        """Whether this is rank 0, which sends the signals."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))

    def signal(self, payload: Any = None) -> None:
        """Signal the other ranks to continue, with a payload; rank 0 only."""
        self._broadcast((True, payload))

    @contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """On an error inside the block, end the other ranks, which wait for a signal or soon will; rank 0 only."""
        try:
            yield
        except BaseException:
            self._broadcast((False, None))
            raise

    def wait_signal(self) -> Any:
        """Wait for rank 0's signal and return its payload. Raises RankZeroFailed where rank 0 aborts."""
        running, payload = self._broadcast(None)
        if not running:
            raise RankZeroFailed
        return payload

    def collect(self, item: Any) -> list[Any] | None:
        """Gather every rank's `item` in the order of ranks on rank 0; None elsewhere. A collective."""
        return gather_objects(item, CONDUCTOR, self._group)

    def close(self) -> None:
        """Destroy the group; a collective."""
        dist.destroy_process_group(self._group)

    def _broadcast(self, message: tuple[bool, Any] | None) -> tuple[bool, Any]:
        """Broadcast rank 0's message to every rank."""
        return broadcast_object(message, CONDUCTOR, self._group)
