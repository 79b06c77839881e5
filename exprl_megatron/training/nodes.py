"""A trainer on several nodes: which ranks are whose, and what the nodes' launchers tell each other.

Each node has its own `exprl train`. That of node 0 has the run's directory and the verdict; it holds the store through
which launchers and ranks meet, as torchrun's agent does. The others start their ranks when it tells them to, tell it
when one of them fails, and end when it ends.
"""

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from exprl_megatron.errors import Preempted, RunStopped, UserError, exit_status
from exprl_megatron.serving.ports import LOCAL

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_MEET_S = 600.0
"""Nodes of a job start their launchers within so long of each other."""
_PART_S = 20.0
_KILLED_S = 6.0
"""A node tells of a killed rank so long after the others at most; see TrainerRanks.running."""
_BEGIN, _FAILED, _ENDED, _GONE = "launchers/begin", "launchers/failed", "launchers/ended", "launchers/gone"
_KILLED = "launchers/killed"
_ENDS = {2: UserError, os.EX_TEMPFAIL: Preempted}
"""Of the statuses that a rank or a node tells; any other is RunStopped."""


class RankKilled(RunStopped):
    """A rank that a signal ended; whatever else failed then, failed of that."""


class RankFailed(RunStopped):
    """An error that no rank expected; it may be that a connection to another rank was lost."""


@dataclass(frozen=True)
class Node:
    """This machine among the trainer's nodes, each of which has as many ranks."""

    number: int = 0
    nodes: int = 1
    host: str = LOCAL
    """Node 0's, as the others reach it."""
    port: int | None = None
    """Of the store there; None for a node that is alone."""

    @classmethod
    def of(cls, number: int | None, nodes: int, master: str | None) -> Self:
        """From what the command line was given. Raises UserError where that is no node of several."""
        if nodes == 1:
            return cls()
        if number is None or not 0 <= number < nodes:
            raise UserError(f"--nodes is {nodes} and --node-rank {number}; give each node its number, from 0.")
        host, _, port = (master or "").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--nodes is {nodes} and --master {master}; give node 0's HOST:PORT.")
        return cls(number, nodes, host, int(port))

    def ranks(self, world_size: int) -> range:
        """This node's ranks. Raises UserError where `world_size` ranks cannot be shared out evenly."""
        if world_size % self.nodes:
            raise UserError(
                f"policy.layout needs {world_size} trainer processes, which {self.nodes} --nodes cannot share evenly; "
                "change one of them."
            )
        each = world_size // self.nodes
        return range(self.number * each, (self.number + 1) * each)


class Host:
    """Node 0's side; does nothing for a node that is alone. As a context it tells the others when this one ends."""

    def __init__(self, node: Node):
        """Raises RunStopped where the port is taken."""
        self._others = node.nodes - 1
        self._store = _store(node, timedelta(seconds=_MEET_S)) if self._others else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._store is None:
            return
        self._store.set(_ENDED, "")
        deadline = time.monotonic() + _PART_S
        # The store ends with this process: the others are to hear of it first.
        while self._store.add(_GONE, 0) < self._others and time.monotonic() < deadline:
            time.sleep(0.05)

    def begin(self) -> None:
        """The run's directory, its config and its servers are there: ranks may start."""
        if self._store is not None:
            self._store.set(_BEGIN, "")

    def check(self) -> None:
        """Raises why another node has reported that it failed."""
        if self._store is not None and self._store.check([_FAILED]):
            error = ended(json.loads(self._store.get(_FAILED)))
            if isinstance(error, RankFailed):
                self.check_for_killed()
            raise error

    def check_for_killed(self) -> None:
        """Raises what another node tells of a rank that was killed, which is why the ranks here have failed."""
        deadline = time.monotonic() + _KILLED_S
        while self._store is not None and time.monotonic() < deadline:
            if self._store.check([_KILLED]):
                raise ended(json.loads(self._store.get(_KILLED)))
            time.sleep(0.1)


class Guest:
    """The side of every other node."""

    def __init__(self, node: Node):
        """Waits for node 0. Raises RunStopped where it does not come."""
        self._node = node
        self._store = _store(node, timedelta(seconds=_MEET_S))

    def await_beginning(self, deadline_s: float) -> bool:
        """Whether node 0 says that ranks may start, rather than that it has ended; RunStopped where it says nothing."""
        deadline = time.monotonic() + deadline_s
        while not self._told(_BEGIN):
            if self.over():
                return False
            if time.monotonic() > deadline:
                raise RunStopped(f"Node 0 of the trainer did not begin within {deadline_s:g} s; see its output.")
            time.sleep(0.2)
        return True

    def over(self) -> bool:
        """Whether node 0 has ended. Raises RunStopped where it is gone without a word."""
        return self._told(_ENDED)

    def tell(self, error: Exception) -> None:
        """Tell node 0 what has ended this node's ranks; the first that tells is heard."""
        unexpected = isinstance(error, RankFailed)
        words = json.dumps({"status": exit_status(error), "message": str(error), "unexpected": unexpected})
        if isinstance(error, RankKilled):
            self._store.set(_KILLED, words)
        self._store.set(_FAILED, words)

    def part(self) -> None:
        """This node has nothing more to say."""
        self._store.add(_GONE, 1)

    def _told(self, key: str) -> bool:
        from torch.distributed import DistError

        try:
            return self._store.check([key])
        except DistError as error:
            raise RunStopped(f"Node 0 of the trainer ({self._node.host}) is gone; see its output.") from error


def ended(reported: dict) -> Exception:
    """What a rank or a node has reported of its end, as {status, message, unexpected}."""
    kind = RankFailed if reported["unexpected"] else _ENDS.get(reported["status"], RunStopped)
    return kind(reported["message"])


def _store(node: Node, timeout: timedelta) -> "TCPStore":
    from torch.distributed import DistError, TCPStore

    try:
        return TCPStore(node.host, node.port, is_master=node.number == 0, wait_for_workers=False, timeout=timeout)
    except DistError as error:
        what = "cannot be listened at" if node.number == 0 else "does not answer"
        raise RunStopped(f"Node 0's {node.host}:{node.port} (--master) {what}: {str(error).splitlines()[0]}") from error
