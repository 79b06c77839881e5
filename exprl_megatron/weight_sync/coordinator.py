"""Coordination of all ranks by rank 0, the only rank that talks to the servers.

Rank 0 runs requests to servers in an event loop in a separate thread, and broadcasts results and errors, so that an
error on rank 0 ends every rank instead of leaving it in a collective. This file is the one place for RankZeroFailed,
the exception of the other ranks.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from exprl_megatron.policy.gloo_group import broadcast_from_rank
from exprl_megatron.policy.signed_objects import broadcast_object, gather_objects

T = TypeVar("T")
RANK_ZERO = 0
_STOP_POLL_S = 1.0


class RankZeroFailed(Exception):
    """Rank 0 has an error, which it reports; the other ranks end silently."""


class RankCoordinator:
    """Runs work on rank 0 and coordinates all ranks. Every rank makes one, with the same deadline; a collective.

    There are two ways in which ranks wait for rank 0. Results of work (`broadcast_from_rank0`, `on_rank0`) may take as
    long as the host group's timeout. Signals of a weight sync (`signal`, `wait_signal`, `collect`) precede each round
    of collectives, and are sent only while all servers have answered without an error. They have a gloo group of their
    own between the hosts, whatever the weights are sent by: a rank that receives no signal for `signal_deadline_s`
    raises RuntimeError, since rank 0 is then dead or hangs.
    """

    def __init__(self, signal_deadline_s: float, asked_to_stop: Callable[[], bool] = lambda: False):
        """`asked_to_stop` returns on rank 0 whether the run should stop at its next checkpoint."""
        self._asked_to_stop = asked_to_stop
        self.is_rank0 = dist.get_rank() == RANK_ZERO
        self._signals: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=signal_deadline_s))
        self._loop = asyncio.new_event_loop() if self.is_rank0 else None
        if self._loop is not None:
            # The thread is a daemon, so that an error in the main thread ends the process in any case.
            self._thread = threading.Thread(target=self._loop.run_forever, name="coordinator", daemon=True)
            self._thread.start()

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 and return its result on every rank; a collective.

        An error of `work` is raised unchanged on rank 0.

        Raises:
            RankZeroFailed: `work` failed; on the other ranks, so that none of them waits.
        """
        error: BaseException | None = None
        box: list[Any] = [False, None]
        if self.is_rank0:
            try:
                box = [True, work()]
            except Exception as caught:  # re-raised below, after the other ranks know
                error = caught
        done, result = broadcast_from_rank(RANK_ZERO, box)
        if error is not None:
            raise error
        if not done:
            raise RankZeroFailed
        return result

    def broadcast_run(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that `start` makes on rank 0 and return its result on every rank; a collective."""
        return self.broadcast_from_rank0(lambda: self.run(start()))

    def on_rank0(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work` on rank 0, None elsewhere; an error on rank 0 ends every rank. A collective."""
        made: list[T] = []
        self.broadcast_from_rank0(lambda: made.append(work()))
        return made[0] if made else None

    def run_collective(self, on_rank0: Callable[[], None], on_others: Callable[[], None]) -> None:
        """Run `on_rank0` on rank 0 and `on_others` on the other ranks; both take part in the same collectives.

        An error on rank 0 within it leaves the others waiting in a collective, unless `on_rank0` aborts them (see
        `abort_on_error`): it ends this process, and the launcher then ends theirs.
        """
        if self.is_rank0:
            on_rank0()
        else:
            on_others()

    def signal(self, payload: Any = None) -> None:
        """Signal the other ranks to continue, with a payload; rank 0 only."""
        self._broadcast_signal((True, payload))

    @contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """End the other ranks on an error inside the block: they wait for a signal or soon will; rank 0 only."""
        try:
            yield
        except BaseException:
            self._broadcast_signal((False, None))
            raise

    def wait_signal(self) -> Any:
        """Wait for rank 0's signal and return its payload.

        Raises:
            RankZeroFailed: rank 0 aborts.
        """
        running, payload = self._broadcast_signal(None)
        if not running:
            raise RankZeroFailed
        return payload

    def collect(self, item: Any) -> list[Any] | None:
        """Gather every rank's `item` in the order of ranks on rank 0; None elsewhere. A collective."""
        return gather_objects(item, RANK_ZERO, self._signals)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` in the event loop and return its future; rank 0 only."""
        assert self._loop is not None, "the event loop exists on rank 0 only"
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` to its end and return its result; rank 0 only."""
        return self.start(coroutine).result()

    def run_unless_asked_to_stop(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        """Run `coroutine`, but cancel it when the run is asked to stop; returns whether it finished. Rank 0 only."""
        future = self.start(coroutine)
        while not wait([future], _STOP_POLL_S).done:
            if self._asked_to_stop():
                future.cancel()
                return False
        future.result()
        return True

    def asked_to_stop(self) -> bool:
        """Return whether the run was asked to stop; the same on every rank. A collective."""
        return self.broadcast_from_rank0(self._asked_to_stop)

    def close(self) -> None:
        """Stop the event loop and its thread; process groups end with the world."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _broadcast_signal(self, message: Any) -> tuple[bool, Any]:
        """Broadcast rank 0's message, (whether the run continues, payload), to every rank."""
        return broadcast_object(message, RANK_ZERO, self._signals)
