"""One communicator: members that connect at their first operation and then run operations one after the other."""

import hashlib
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from nccl_like.records import Patience, record

DEVICE = "NCCL_LIKE_DEVICE"
_POLL_S = 0.003
_EVER = timedelta(days=7)
_SAY_S = 30.0


class Broken(RuntimeError):
    """The operation did not end well."""


class Work(dist.Work):
    """An operation in flight."""

    def __init__(self, what: str, timeout: timedelta):
        super().__init__()
        self.what = what
        self._timeout_s = timeout.total_seconds()
        self._began = time.monotonic()
        self._done = threading.Event()
        self._error: Broken | None = None

    def finish(self, error: Broken | None = None) -> None:
        """The end of the operation; the first one counts."""
        if not self._done.is_set():
            self._error = error
            self._done.set()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def is_success(self) -> bool:
        return self._done.is_set() and self._error is None

    def exception(self) -> Broken | None:
        return self._error

    def wait(self, timeout: timedelta | None = None) -> bool:
        """As NCCL's watchdog: an operation that takes longer than the group's timeout is an error."""
        left_s = self._began + self._timeout_s - time.monotonic()
        if timeout:
            left_s = min(left_s, timeout.total_seconds())
        if not self._done.wait(max(0.0, left_s)):
            text = f"{self.what} was not done within the group's timeout of {self._timeout_s:g} s"
            record("timeout", f"{text}\n{''.join(traceback.format_stack()[:-1])}")
            self.finish(Broken(text))
        if self._error is not None:
            raise Broken(str(self._error)) from self._error
        return True

    def synchronize(self) -> None:
        self.wait()


@dataclass
class Call:
    """An operation as one member calls it."""

    signature: str
    """What must be alike on all members."""
    run: Callable[[dist.ProcessGroup], None]
    """Does it over gloo, to its end."""
    work: Work
    alone: bool = False
    """Whether members outside the operation do not call it (a batch of sends and receives)."""


@dataclass
class Communicator:
    """The `members` (ranks of the group) of which this process is number `index`; `store` is theirs alone."""

    name: str
    store: dist.Store
    members: Sequence[int]
    index: int
    connected: bool = False
    aborted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._open: list[Work] = []
        self._number = 0
        self._connecting = threading.Lock()
        self._gloo: dist.ProcessGroup | None = None

    def call(self, call: Call) -> None:
        """Enter an operation; the first one connects, in the thread of the caller."""
        with self._connecting:
            if not self.connected:
                self._connect(call.work.what)
        if self.aborted.is_set():
            raise Broken(f"{self.name} was aborted")
        self._open = [work for work in self._open if not work.is_completed()] + [call.work]
        self._calls.put(call)

    def abort(self) -> None:
        """Give all operations up that are in flight. The others do not notice."""
        self.aborted.set()
        for work in self._open:
            work.finish(Broken(f"{work.what}: {self.name} was aborted"))
        self._mark("gone")

    def destroy(self) -> None:
        """Wait for operations in flight, and until the others destroy it too, unless somebody aborts."""
        patience = Patience(lambda: f"destroying {self.name} with {self._under_way() or 'other members in it'}")
        while self._under_way() and not self.aborted.is_set():
            time.sleep(_POLL_S)
            patience.check()
        self._calls.put(None)
        self._mark("gone")
        while self.connected and not self.aborted.is_set() and self._who_lacks("gone"):
            time.sleep(_POLL_S)
            patience.check()
        self.aborted.set()

    def _under_way(self) -> list[str]:
        return [work.what for work in self._open if not work.is_completed()]

    def _connect(self, what: str) -> None:
        """Block until all members are here, and make sure that each has a device of its own."""
        lacking: list[int] = []
        patience = Patience(
            lambda: (
                f"the first operation of {self.name} ({what}) on thread {threading.current_thread().name}: "
                f"rank {self.members[self.index]} of {len(self.members)} waits for {', '.join(map(str, lacking))}"
            )
        )
        device = os.environ.get(DEVICE) or f"process {os.getpid()}"
        self.store.set(f"here/{self.index}", f"{os.getpid()} {device}")
        while lacking := self._lacking("here"):
            time.sleep(_POLL_S)
            patience.check()
        devices = [self.store.get(f"here/{i}").decode().split(" ", 1)[1] for i in range(len(self.members))]
        if len(set(devices)) < len(devices):
            text = f"{self.name}: duplicate device: the members declare {', '.join(devices)}"
            record("same device", text)
            raise Broken(text)
        self._gloo = _gloo(dist.PrefixStore("gloo", self.store), self.index, len(self.members))
        self.connected = True
        record("connected", f"{self.name}, of {len(self.members)}")
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def _lacking(self, key: str) -> list[int]:
        """The ranks that have not set `key`."""
        return [rank for i, rank in enumerate(self.members) if not self.store.check([f"{key}/{i}"])]

    def _who_lacks(self, key: str) -> list[int]:
        """The same of those whose processes live; nobody where the store is gone."""
        try:
            lacking = self._lacking(key)
            pids = {rank: int(self.store.get(f"here/{self.members.index(rank)}").split()[0]) for rank in lacking}
        except RuntimeError:
            return []
        return [rank for rank, pid in pids.items() if os.path.exists(f"/proc/{pid}")]

    def _mark(self, key: str) -> None:
        try:
            self.store.set(f"{key}/{self.index}", "")
        except RuntimeError:
            # Its owner has left.
            return

    def _run(self) -> None:
        """Does one operation after the other."""
        while (call := self._calls.get()) is not None:
            if self.aborted.is_set():
                return
            try:
                if len(self.members) > 1 and not call.alone:
                    self._compare(call.signature)
                call.run(self._gloo)
            except Broken as error:
                record("differs", str(error))
                call.work.finish(error)
            except RuntimeError:
                # A member aborted. NCCL does not notice: operations in flight stay there.
                return
            call.work.finish()

    def _compare(self, signature: str) -> None:
        """Raise Broken where the members call different operations."""
        self._number += 1
        own = int.from_bytes(hashlib.sha256(signature.encode()).digest()[:7])
        found = [torch.zeros(1, dtype=torch.int64) for _ in self.members]
        self._gloo.allgather([found], [torch.tensor([own])]).wait()
        if any(int(one) != own for one in found):
            self.store.set(f"call/{self._number}/{self.index}", signature)
            keys = [f"call/{self._number}/{i}" for i in range(len(self.members))]
            self.store.wait(keys, timedelta(seconds=_SAY_S))
            calls = [
                f"rank {rank}: {self.store.get(key).decode()}" for rank, key in zip(self.members, keys, strict=True)
            ]
            raise Broken(f"{self.name}: operation {self._number} differs between members: {'; '.join(calls)}")


def _gloo(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    backend = dist.ProcessGroupGloo(store, rank, size, _EVER)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group
