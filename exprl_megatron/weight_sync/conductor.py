"""Coordination of the ranks: rank 0 talks to the servers and broadcasts the results."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch.distributed as dist

from exprl_megatron.policy.host_group import from_rank
from exprl_megatron.weight_sync.control import RankZeroFailed

T = TypeVar("T")
_ASK_S = 1.0


class Conductor:
    """Runs work on rank 0 and broadcasts its result to all ranks.

    Everything that waits for servers runs in one event loop in a separate thread, so that
    requests continue while this process computes.
    """

    def __init__(self, asked_to_stop: Callable[[], bool] = lambda: False):
        """`asked_to_stop` returns on rank 0 whether the run should stop at its next checkpoint."""
        self._asked_to_stop = asked_to_stop
        self.here = dist.get_rank() == 0
        self._loop = asyncio.new_event_loop() if self.here else None
        if self._loop is not None:
            # A daemon, so that an error in the main thread ends the process in any case.
            self._thread = threading.Thread(target=self._loop.run_forever, name="conductor", daemon=True)
            self._thread.start()

    def everywhere(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 and return its result on every rank.

        An error is raised unchanged on rank 0 and as RankZeroFailed on the other ranks, so that none of them waits.
        """
        error: BaseException | None = None
        box: list[Any] = [False, None]
        if self.here:
            try:
                box = [True, work()]
            except Exception as caught:  # re-raised below, after the other ranks know
                error = caught
        done, result = from_rank(0, box)
        if error is not None:
            raise error
        if not done:
            raise RankZeroFailed
        return result

    def collective(self, conducting: Callable[[], None], following: Callable[[], None]) -> None:
        """Run `conducting` on rank 0 and `following` on the other ranks; both take part in the same collectives.

        An error on rank 0 within it leaves the others waiting in a collective: it ends this process,
        and the launcher then ends theirs.
        """
        if self.here:
            conducting()
        else:
            following()

    def here_alone(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work` on rank 0, None elsewhere; an error on rank 0 ends every rank."""
        made: list[T] = []
        self.everywhere(lambda: made.append(work()))
        return made[0] if made else None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` in the event loop and return its future; rank 0 only."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end and return its result; rank 0 only."""
        return self.start(coroutine).result()

    def run_unless_asked_to_stop(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        """Run `coroutine`, but cancel it when the run is asked to stop; returns whether it finished. Rank 0 only."""
        future = self.start(coroutine)
        while not wait([future], _ASK_S).done:
            if self._asked_to_stop():
                future.cancel()
                return False
        future.result()
        return True

    def asked_to_stop(self) -> bool:
        """Whether the run was asked to stop; the same on every rank."""
        return self.everywhere(self._asked_to_stop)

    def close(self) -> None:
        """Stop the event loop and its thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
