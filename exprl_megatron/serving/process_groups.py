"""Process groups for tensors under NCCL's rules: the threads that call them, and how they are destroyed or aborted."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

_ABORT_S = 10.0


def in_background[T](name: str, work: Callable[[], T]) -> Future[T]:
    """Start `work` on a daemon thread."""
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, work), name=name, daemon=True).start()
    return future


class GroupThread:
    """The one thread that calls a group's operations, in order.

    The first of them connects an NCCL group: it blocks its caller until every member has called it, without a timeout.
    So no other thread may call it. The thread is a daemon: blocked forever, it does not keep the process from ending.
    """

    def __init__(self, name: str):
        self._calls: queue.SimpleQueue[tuple[Future, Callable] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit[T](self, work: Callable[[], T]) -> Future[T]:
        """Call `work` after all work submitted before."""
        future: Future[T] = Future()
        self._calls.put((future, work))
        return future

    def stop(self) -> None:
        """End the thread after the submitted work; does not wait."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            _settle(*call)


def on_device(device: torch.device) -> AbstractContextManager:
    """Make `device` the current CUDA device of this thread, if it is a CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def destroy(group: dist.ProcessGroup, deadline_s: float) -> None:
    """Destroy an idle group together with its other members, for which NCCL waits; abort it after `deadline_s`."""
    wait_destroyed(group, start_destroy(group), deadline_s)


def start_destroy(group: dist.ProcessGroup) -> Future[None]:
    """Start to destroy an idle group."""
    return in_background("destroy", lambda: dist.destroy_process_group(group))


def wait_destroyed(group: dist.ProcessGroup, destroying: Future[None], deadline_s: float) -> None:
    """Return when the group is destroyed; abort it after `deadline_s`."""
    try:
        destroying.result(deadline_s)
    except TimeoutError:
        abort(group)


def abort(group: dist.ProcessGroup) -> None:
    """Abort a group with operations in flight; over NCCL they fail on this rank, and other members do not notice."""

    def work() -> None:
        # Destroying waits for operations in flight. Gloo has no abort, and does not wait.
        if dist.get_backend(group) != "gloo":
            group.abort()
        dist.destroy_process_group(group)

    # A thread that is blocked in the group's first operation may block this one; then both are abandoned.
    wait([in_background("abort", work)], _ABORT_S)


def _settle[T](future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # the caller that waits for the future raises it
        future.set_exception(error)
