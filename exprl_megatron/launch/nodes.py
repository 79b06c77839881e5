"""A trainer on several nodes: which ranks are whose, and what the nodes' launchers tell each other.

Each node has its own `exprl train`. That of node 0 has the run's directory and the verdict; it holds the store through
which launchers and ranks meet, as torchrun's agent does. The others start their ranks when it tells them to, tell it
when one of them fails, and end when it ends. What one says to the other is believed only with the run's key's code.

Why not torch.distributed.elastic: its rendezvous and its store accept messages from anyone who can connect, its agent
imports torch (the launcher here imports no library that computes), it knows workers alone where a run also has servers,
and it restarts workers in place where a run ends with a status and resumes from its checkpoint.
"""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from exprl_megatron.errors import Preempted, RunStopped, ServerError, UserError, exit_status
from exprl_megatron.serving.keys import read_key
from exprl_megatron.utils.ports import LOCAL, interface

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from exprl_megatron.utils.keyed_store import Records

_MEET_S = 600.0
"""Nodes of a job start their launchers within so long of each other."""
_PART_S = 20.0
_KILLED_S = 6.0
"""A node tells of a killed rank so long after the others at most; see TrainerRanks.running."""
_PURPOSE = "launchers"
_BEGIN, _FAILED, _KILLED, _ENDED, _GONE = "begin", "failed", "killed", "ended", "gone"
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


class _Words:
    """The records of a store that launchers believe."""

    def __init__(self, records: "Records"):
        self._records = records
        self._complained: set[str] = set()

    def say(self, name: str, words: str = "") -> None:
        """Put `words` there."""
        self._records.set(name, words)

    def heard(self, name: str) -> bytes | None:
        """What was said, if anything was; what somebody without the key wrote is ignored, and reported once."""
        from exprl_megatron.utils.authentication import NotAuthentic

        try:
            return self._records.get(name) if self._records.check([name]) else None
        except NotAuthentic as error:
            if name not in self._complained:
                self._complained.add(name)
                where = f"the trainer's store at {self._records.host}:{self._records.port}"
                print(f"exprl: {error} in {where}; it is ignored.", file=sys.stderr, flush=True)
            return None

    def count(self, one_more: int) -> int:
        """How many nodes have nothing more to say."""
        return self._records.add(_GONE, one_more)


class HeadNode:
    """Node 0's side; does nothing for a node that is alone. As a context it tells the others when this one ends."""

    def __init__(self, node: Node, key_file: Path):
        """Raises RunStopped where the port is taken, ServerError where there is no key and other nodes need it."""
        self._others = node.nodes - 1
        self._words: _Words | None = None
        if self._others:
            key = read_key(key_file)
            self._words = _words(_listening(node), key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._words is None:
            return
        self._words.say(_ENDED)
        deadline = time.monotonic() + _PART_S
        # The store ends with this process: the others are to hear of it first.
        while self._words.count(0) < self._others and time.monotonic() < deadline:
            time.sleep(0.05)

    def begin(self) -> None:
        """The run's directory, its config and its servers are there: ranks may start."""
        if self._words is not None:
            self._words.say(_BEGIN)

    def check(self) -> None:
        """Raises why another node has reported that it failed."""
        if self._words is not None and (words := self._words.heard(_FAILED)) is not None:
            error = ended(read_end(words, "What another node reported"))
            if isinstance(error, RankFailed):
                self.check_for_killed()
            raise error

    def check_for_killed(self) -> None:
        """Raises what another node tells of a rank that was killed, which is why the ranks here have failed."""
        deadline = time.monotonic() + _KILLED_S
        while self._words is not None and time.monotonic() < deadline:
            if (words := self._words.heard(_KILLED)) is not None:
                raise ended(read_end(words, "What another node reported"))
            time.sleep(0.1)


class WorkerNode:
    """The side of every other node."""

    def __init__(self, node: Node, key_file: Path):
        """Waits for node 0. Raises RunStopped where it does not come."""
        self._node = node
        self._key_file = key_file
        self._store = _reached(node)
        self._key: str | None = None
        self._words: _Words | None = None
        """With that key."""
        self._heard = False
        """Whether node 0 has been heard: from then on the key is known to be that of its run."""

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
            self._words.say(_KILLED, words)
        self._words.say(_FAILED, words)

    def part(self) -> None:
        """This node has nothing more to say."""
        self._words.count(1)

    def _told(self, name: str) -> bool:
        from torch.distributed import DistError

        try:
            if not self._heard:
                self._read_key()
            # Asking is also how this node notices that node 0 is gone.
            told = self._store.check([name]) if self._words is None else self._words.heard(name) is not None
        except DistError as error:
            raise RunStopped(f"Node 0 of the trainer ({self._node.host}) is gone; see its output.") from error
        if self._words is None:
            return False
        self._heard |= told
        return told

    def _read_key(self) -> None:
        """Node 0 makes the key, perhaps after us: until it is heard, the file may hold none, or an earlier one."""
        with suppress(ServerError):
            key = read_key(self._key_file)
            if key != self._key:
                self._key, self._words = key, _words(self._store, key)


class End(msgspec.Struct, frozen=True):
    """What a rank or a node has reported of its end."""

    status: int
    message: str
    unexpected: bool


def read_end(words: bytes, what: str) -> End:
    """The report in `words`; where it is garbled, one that says so of `what`."""
    try:
        return msgspec.json.decode(words, type=End)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"{what} of its end is garbled ({error}); see the logs of that node, and continue with --resume."
        return End(1, message, unexpected=True)


def ended(reported: End) -> Exception:
    """What to raise for it."""
    kind = RankFailed if reported.unexpected else _ENDS.get(reported.status, RunStopped)
    return kind(reported.message)


def _words(store: "TCPStore", key: str) -> _Words:
    from exprl_megatron.utils.keyed_store import Records

    return _Words(Records(store, key, _PURPOSE))


def _listening(node: Node) -> "TCPStore":
    """Node 0's store."""
    from torch.distributed import DistError

    from exprl_megatron.utils.keyed_store import listening_store

    try:
        return listening_store(interface(node.host), node.port, _MEET_S)
    except (DistError, OSError) as error:
        raise _unreachable(node, "cannot be listened at", error) from error


def _reached(node: Node) -> "TCPStore":
    """The store, seen from another node."""
    from torch.distributed import DistError

    from exprl_megatron.utils.keyed_store import reached_store

    try:
        return reached_store(node.host, node.port, _MEET_S)
    except DistError as error:
        raise _unreachable(node, "does not answer", error) from error


def _unreachable(node: Node, what: str, error: Exception) -> RunStopped:
    return RunStopped(f"Node 0's {node.host}:{node.port} (--master) {what}: {str(error).splitlines()[0]}")
