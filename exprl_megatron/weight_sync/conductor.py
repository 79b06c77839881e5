"""Rank 0 talks to the servers; what it learns there, every rank gets."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch.distributed as dist

from exprl_megatron.policy.host_group import from_rank

T = TypeVar("T")
_ASK_S = 1.0


class ConductorFailed(Exception):
    """Rank 0 met an error and reports it; the other ranks only end."""


class Conductor:
    """Runs work on rank 0 alone and hands its result to all ranks.

    All that waits for servers runs in one event loop, as open connections need, in a thread of its own: what was
    started there goes on while this process computes.
    """

    def __init__(self, asked_to_stop: Callable[[], bool] = lambda: False):
        """`asked_to_stop` says on rank 0 whether somebody wants the run to end soon."""
        self._asked_to_stop = asked_to_stop
        self.here = dist.get_rank() == 0
        self._loop = asyncio.new_event_loop() if self.here else None
        if self._loop is not None:
            # A daemon, so that an error in the main thread ends the process whatever is under way.
            self._thread = threading.Thread(target=self._loop.run_forever, name="conductor", daemon=True)
            self._thread.start()

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
        done, result = from_rank(0, box)
        if error is not None:
            raise error
        if not done:
            raise ConductorFailed
        return result

    def collective(self, conducting: Callable[[], None], following: Callable[[], None]) -> None:
        """Rank 0 runs `conducting` while the others run `following`; both meet in collectives on the way.

        An error on rank 0 in the midst of it leaves the others waiting in a collective: it ends this process,
        and the launcher then ends theirs.
        """
        if self.here:
            conducting()
        else:
            following()

    def here_alone(self, work: Callable[[], T]) -> T | None:
        """The result of `work` on rank 0, and None elsewhere; an error on rank 0 is raised on every rank."""
        made: list[T] = []
        self.everywhere(lambda: made.append(work()))
        return made[0] if made else None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Let `coroutine` run beside whatever this process does next; rank 0 only."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end; rank 0 only."""
        return self.start(coroutine).result()

    def run_unless_asked_to_stop(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        """Whether `coroutine` came to its end; it is cancelled when the run is asked to stop. Rank 0 only."""
        future = self.start(coroutine)
        while not wait([future], _ASK_S).done:
            if self._asked_to_stop():
                future.cancel()
                return False
        future.result()
        return True

    def asked_to_stop(self) -> bool:
        """Whether the run is to end soon; the same on every rank."""
        return self.everywhere(self._asked_to_stop)

    def close(self) -> None:
        """Release the event loop."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
