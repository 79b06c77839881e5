"""How rank 0 leads all ranks through a sync, so that a server's refusal ends every rank instead of leaving it waiting.

Before each round of collectives every rank waits here for rank 0's word, which is given only while all servers have
answered well. The word goes through a group of its own, over gloo on the hosts, whatever the weights go through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from exprl_megatron.policy.sealed_objects import broadcast_object, gather_objects

CONDUCTOR = 0


class SyncStopped(Exception):
    """Rank 0 met an error in the midst of a sync and reports it; the other ranks only end."""


class Control:
    """Every rank makes one, with the same `deadline_s`, in the same order; a collective.

    A rank that hears nothing for `deadline_s` raises RuntimeError: rank 0 is then dead or hangs.
    """

    def __init__(self, deadline_s: float):
        self.here = dist.get_rank() == CONDUCTOR
        """Whether this rank is the one that leads."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=deadline_s))

    def go(self, word: Any = None) -> None:
        """Let the others go on, and tell them `word`; rank 0 only."""
        self._say((True, word))

    @contextmanager
    def leading(self) -> Iterator[None]:
        """An error inside lets the others end, who wait for a word or soon will; rank 0 only."""
        try:
            yield
        except BaseException:
            self._say((False, None))
            raise

    def await_go(self) -> Any:
        """The word with which rank 0 lets this rank go on. Raises SyncStopped where it does not."""
        going, word = self._say(None)
        if not going:
            raise SyncStopped
        return word

    def collect(self, item: Any) -> list[Any] | None:
        """Every rank's `item` in the order of ranks, on rank 0; None elsewhere. A collective."""
        return gather_objects(item, CONDUCTOR, self._group)

    def close(self) -> None:
        """Give the group up; a collective."""
        dist.destroy_process_group(self._group)

    def _say(self, words: tuple[bool, Any] | None) -> tuple[bool, Any]:
        """Rank 0's words, on every rank."""
        return broadcast_object(words, CONDUCTOR, self._group)
