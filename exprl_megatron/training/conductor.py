"""Rank 0 talks to the servers; what it learns there, every rank gets."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class ConductorFailed(Exception):
    """Rank 0 met an error and reports it; the other ranks only end."""


class Conductor:
    """Runs work on rank 0 alone and hands its result to all ranks."""

    def __init__(self):
        self.here = dist.get_rank() == 0
        self._loop = asyncio.new_event_loop() if self.here else None

    def everywhere(self, work: Callable[[], T]) -> T:
        """The result of `work`, called on rank 0, on every rank.

        An error is raised as it is on rank 0 and as ConductorFailed on the others, so that none waits.
        """
        error: BaseException | None = None
        box: list[Any] = [False, None]
        if self.here:
            try:
                box = [True, work()]
            except Exception as caught:  # re-raised below, after the other ranks know
                error = caught
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if not box[0]:
            raise ConductorFailed
        return box[1]

    def collective(self, conducting: Callable[[], None], following: Callable[[], None]) -> None:
        """Rank 0 runs `conducting` while the others run `following`; both meet in collectives on the way.

        An error on rank 0 in the midst of it leaves the others waiting in a collective: it ends this process,
        and the launcher then ends theirs.
        """
        if self.here:
            conducting()
        else:
            following()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end; rank 0 only. All share one event loop, as open connections need."""
        return self._loop.run_until_complete(coroutine)

    def close(self) -> None:
        """Release the event loop."""
        if self._loop is not None:
            self._loop.close()
