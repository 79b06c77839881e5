"""A trainer on several nodes: the ranks of each node, and the messages between the nodes' launchers.

Each node has its own `exprl train`. Node 0 is the head node: it has the run's directory, decides how the run ended, and
runs the rendezvous store of launchers and ranks, as torchrun's agent does. Worker nodes start their ranks at its
signal, report failures to it, and end when it ends. Messages are accepted only with an authentication code of the run's
key.

Why not torch.distributed.elastic: its rendezvous and its store accept messages from anyone who can connect, its agent
imports torch (the launcher here imports no compute library), it manages only workers where a run also has servers, and
it restarts workers in place where a run ends with a status and resumes from its checkpoint.
"""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from exprl_megatron.errors import RunStopped, ServerError, UserError
from exprl_megatron.launch.exit_reports import RankFailed, RankKilled, exit_error, exit_report, parse_exit_report
from exprl_megatron.serving.keys import read_key
from exprl_megatron.utils.ports import LOCAL, interface
from exprl_megatron.utils.required import required

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from exprl_megatron.utils.keyed_store import Records

_CONNECT_S = 600.0
"""Maximum time in seconds between the starts of two nodes' launchers."""
_LEAVE_S = 20.0
_KILLED_S = 6.0
"""Maximum time in seconds until another node's report of a killed rank arrives; see TrainerRanks.running."""
_PURPOSE = "launchers"
_BEGIN, _FAILED, _KILLED, _ENDED, _GONE = "begin", "failed", "killed", "ended", "gone"


@dataclass(frozen=True)
class Node:
    """This machine's place among the trainer's nodes, all of which have the same number of ranks."""

    number: int = 0
    nodes: int = 1
    host: str = LOCAL
    """Address of node 0 for the other nodes."""
    port: int | None = None
    """Port of the store there; None for a single node."""

    @classmethod
    def from_options(cls, number: int | None, nodes: int, master: str | None) -> Self:
        """Build from the command line's options.

        Args:
            number: number of this node, from 0.
            nodes: number of the trainer's nodes.
            master: HOST:PORT of node 0.

        Raises:
            UserError: the options do not describe one of several nodes.
        """
        if nodes == 1:
            return cls()
        if number is None or not 0 <= number < nodes:
            raise UserError(f"--nodes is {nodes} and --node-rank {number}; give each node its number, from 0.")
        host, _, port = (master or "").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--nodes is {nodes} and --master {master}; give node 0's HOST:PORT.")
        return cls(number, nodes, host, int(port))

    def ranks(self, world_size: int) -> range:
        """Return this node's ranks.

        Raises:
            UserError: `world_size` is not a multiple of the number of nodes.
        """
        if world_size % self.nodes:
            raise UserError(
                f"policy.layout needs {world_size} trainer processes, which is not a multiple of {self.nodes} --nodes; "
                "change one of them."
            )
        each = world_size // self.nodes
        return range(self.number * each, (self.number + 1) * each)


class _Messages:
    """The authenticated records of the launchers' store."""

    def __init__(self, records: "Records"):
        self._records = records
        self._reported_invalid: set[str] = set()

    def write(self, name: str, text: str = "") -> None:
        """Write the record `name`."""
        self._records.set(name, text)

    def read(self, name: str) -> bytes | None:
        """Read a record, if it exists; one without a valid code is ignored, and reported once."""
        from exprl_megatron.utils.authentication import NotAuthentic

        try:
            return self._records.get(name) if self._records.check([name]) else None
        except NotAuthentic as error:
            if name not in self._reported_invalid:
                self._reported_invalid.add(name)
                where = f"the trainer's store at {self._records.host}:{self._records.port}"
                print(f"exprl: {error} in {where}; it is ignored.", file=sys.stderr, flush=True)
            return None

    def count(self, one_more: int) -> int:
        """Add `one_more` to the number of nodes that have finished reporting, and return it."""
        return self._records.add(_GONE, one_more)


class HeadNode:
    """Node 0's side; does nothing for a single node. As a context manager, it notifies the others at its end.

    Args:
        node: this node.
        key_file: file of the run's key.

    Raises:
        RunStopped: the port is taken.
        ServerError: there is no key, and other nodes need it.
    """

    def __init__(self, node: Node, key_file: Path):
        self._others = node.nodes - 1
        self._messages: _Messages | None = None
        if self._others:
            key = read_key(key_file)
            self._messages = _messages(_listen_store(node), key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._messages is None:
            return
        self._messages.write(_ENDED)
        deadline = time.monotonic() + _LEAVE_S
        # The store ends with this process, so the other nodes must read the record first.
        while self._messages.count(0) < self._others and time.monotonic() < deadline:
            time.sleep(0.05)

    def signal_start(self) -> None:
        """Signal that the run's directory, its config and its servers are ready, so that ranks may start."""
        if self._messages is not None:
            self._messages.write(_BEGIN)

    def raise_reported(self) -> None:
        """Raise the error that another node has reported, if any.

        Raises:
            UserError, RunStopped, Preempted: the error that ended the other node's ranks.
        """
        if self._messages is not None and (report := self._messages.read(_FAILED)) is not None:
            error = exit_error(parse_exit_report(report, "What another node reported"))
            if isinstance(error, RankFailed):
                self.check_for_killed()
            raise error

    def check_for_killed(self) -> None:
        """Wait briefly for another node's report of a killed rank, which is the cause of the failures here.

        Raises:
            RunStopped: the error of the killed rank.
        """
        deadline = time.monotonic() + _KILLED_S
        while self._messages is not None and time.monotonic() < deadline:
            if (report := self._messages.read(_KILLED)) is not None:
                raise exit_error(parse_exit_report(report, "What another node reported"))
            time.sleep(0.1)


class WorkerNode:
    """The side of a worker node; it waits for node 0 when it is created.

    Args:
        node: this node.
        key_file: file of the run's key.

    Raises:
        RunStopped: node 0 does not start.
    """

    def __init__(self, node: Node, key_file: Path):
        self._node = node
        self._key_file = key_file
        self._store = _connect_store(node)
        self._key: str | None = None
        self._messages: _Messages | None = None
        """The store's records, authenticated with the run's key."""
        self._heard = False
        """Whether a valid record of node 0 was read: the key is then known to be the run's."""

    def wait_for_start(self, deadline_s: float) -> bool:
        """Wait at most `deadline_s` seconds; returns whether ranks may start, False where node 0 has ended.

        Raises:
            RunStopped: there is no signal in time, or node 0's store is gone.
        """
        deadline = time.monotonic() + deadline_s
        while not self._has_record(_BEGIN):
            if self.has_ended():
                return False
            if time.monotonic() > deadline:
                raise RunStopped(f"Node 0 of the trainer did not start within {deadline_s:g} s; see its output.")
            time.sleep(0.2)
        return True

    def has_ended(self) -> bool:
        """Return whether node 0 has ended.

        Raises:
            RunStopped: its store is gone without a report.
        """
        return self._has_record(_ENDED)

    def report(self, error: Exception) -> None:
        """Report to node 0 the error that ended this node's ranks; node 0 reads the first report."""
        report, messages = exit_report(error), required(self._messages, "the key of the run")
        if isinstance(error, RankKilled):
            messages.write(_KILLED, report)
        messages.write(_FAILED, report)

    def leave(self) -> None:
        """Report that this node has finished."""
        required(self._messages, "the key of the run").count(1)

    def _has_record(self, name: str) -> bool:
        from torch.distributed import DistError

        try:
            if not self._heard:
                self._read_key()
            # The request also detects that node 0 is gone.
            found = self._store.check([name]) if self._messages is None else self._messages.read(name) is not None
        except DistError as error:
            raise RunStopped(f"Node 0 of the trainer ({self._node.host}) is gone; see its output.") from error
        if self._messages is None:
            return False
        self._heard |= found
        return found

    def _read_key(self) -> None:
        """Read the key, which node 0 may write later; until its first record the file may be missing or out of date."""
        with suppress(ServerError):
            key = read_key(self._key_file)
            if key != self._key:
                self._key, self._messages = key, _messages(self._store, key)


def _messages(store: "TCPStore", key: str) -> _Messages:
    from exprl_megatron.utils.keyed_store import Records

    return _Messages(Records(store, key, _PURPOSE))


def _listen_store(node: Node) -> "TCPStore":
    """Start node 0's store."""
    from torch.distributed import DistError

    from exprl_megatron.utils.keyed_store import start_store

    try:
        return start_store(interface(node.host), required(node.port, "the port of --master"), _CONNECT_S)
    except (DistError, OSError) as error:
        raise _unreachable(node, "cannot be used to listen", error) from error


def _connect_store(node: Node) -> "TCPStore":
    """Connect to node 0's store from another node."""
    from torch.distributed import DistError

    from exprl_megatron.utils.keyed_store import connect_store

    try:
        return connect_store(node.host, required(node.port, "the port of --master"), _CONNECT_S)
    except DistError as error:
        raise _unreachable(node, "does not answer", error) from error


def _unreachable(node: Node, what: str, error: Exception) -> RunStopped:
    return RunStopped(f"Node 0's {node.host}:{node.port} (--master) {what}: {str(error).splitlines()[0]}")
