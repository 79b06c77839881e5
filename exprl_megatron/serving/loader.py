"""Runs in SGLang's processes: receives weights from the trainer's ranks straight into the model's parameters.

A command without a valid authentication code is logged and has no effect (see CommandGate). A command that fails is
reported to the trainer through its store, and logged: an exception would end the server.
"""

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from sglang.srt.runtime_context import get_device, get_server_args
from sglang.srt.utils.common import init_custom_process_group
from sglang.srt.utils.weight_checker import _is_skip_weight_check

from exprl_megatron.serving.loader_commands import ABORTED, NOT_FOLLOWED, RECORDS, CommandGate, CommandRefused
from exprl_megatron.serving.loader_trace import trace
from exprl_megatron.serving.model_checksums import Report, checksums
from exprl_megatron.serving.process_groups import abort, destroy, in_background, on_device
from exprl_megatron.serving.staging_buffers import StagingBuffers, run_rounds
from exprl_megatron.serving.transfer_tables import (
    RankTransfers,
    Slice,
    Transfer,
    needs_table,
    pack_needs,
    unpack_transfers,
)
from exprl_megatron.serving.weight_layout import is_weight
from exprl_megatron.utils.authentication import NotAuthentic
from exprl_megatron.utils.keyed_store import Records, connect_store
from exprl_megatron.utils.required import required

_log = logging.getLogger(__name__)
_CONNECT_S = 30.0
_WATCH_S = 0.2
_member: "_Member | None" = None
_gate: CommandGate | None = None
_expected: tuple[str, bytes] = ("", b"")
"""Name and content of the record in the trainer's store that describes the parameters it expects."""


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Execute the command that is passed as the name of the only tensor: this is SGLang's custom weight loader.

    The tensor has no values (shape []). `join` makes this rank a member of the trainer's group in place of any former
    group, and reports the slices that it needs; `receive` fills the parameters; `leave` ends the membership; `finish`
    does nothing: the request that carries it sets the version of the weights. `checksums` reports the parameters'
    checksums; it needs no membership.
    """
    global _member, _gate
    if _gate is None:
        _gate = CommandGate(get_server_args().api_key, get_device().random_seed)
    try:
        command = _gate.admit(named_tensors[0][0])
    except CommandRefused as refusal:
        _log.error("a command to the weight loader is refused: %s", refusal)
        return
    if command["do"] == "checksums":
        return _report_checksums(model, command)
    error_text = ""
    try:
        if command["do"] == "join":
            former, _member = _member, None
            if former is not None:
                former.abort()
            _member = _Member(command)
            _member.join(model)
        elif command["do"] == "receive":
            required(_member, "the membership of this rank").receive()
        elif command["do"] == "leave":
            required(_member, "the membership of this rank").leave()
    except Exception as error:  # SGLang's process would end with it
        _log.exception("the command to %s weights failed", command["do"])
        error_text = f"{type(error).__name__}: {error}"
    if _member is not None:
        _member.answer(command["answer"], error_text)


def _report_checksums(model: torch.nn.Module, command: dict[str, Any]) -> None:
    """Write the parameters' checksums, or the error, to the trainer's store."""
    global _expected
    try:
        records = _records(command)
        try:
            if _expected[0] != command["expected"]:
                _expected = command["expected"], records.get(command["expected"])
            report = Report(checksums(_compared(model), _expected[1]))
        except Exception as error:  # SGLang's process would end with it
            _log.exception("the checksums of the weights failed")
            report = Report(error=f"{type(error).__name__}: {error}")
        _put(records, command["answer"], msgspec.msgpack.encode(report))
    except (RuntimeError, NotAuthentic):
        _log.exception("the trainer cannot be informed")


def _compared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that SGLang's own weight checker compares, but buffers that are derived from the config."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in tensors if is_weight(name) and not _is_skip_weight_check(name, tensor)}


def _connection(command: dict[str, Any]) -> dist.TCPStore:
    """Connect to the trainer's store. A call that waits blocks other calls on the same connection."""
    # The trainer waits for this rank: its store can be reached immediately or not at all.
    return connect_store(command["address"], command["port"], min(_CONNECT_S, command["deadline_s"]))


def _records(command: dict[str, Any]) -> Records:
    """Return the records that trainer and servers share, on a connection of its own."""
    return Records(_connection(command), command["secret"], RECORDS)


def _put(records: Records, name: str, value: str | bytes) -> None:
    records.set(name, value)
    # A set is not acknowledged; without a reply, the trainer could read before another rank's answer is written.
    records.get(name)


class _Member:
    """This rank's membership in the group of one trainer and all its servers."""

    def __init__(self, command: dict[str, Any]):
        self._command = command
        self._records = _records(command)
        self._rank = command["rank"]
        self._group: dist.ProcessGroup | None = None
        self._transfers: RankTransfers | None = None
        self._broken = threading.Event()

    def answer(self, to: str, said: str) -> None:
        """Report a command's error to the trainer, "" for success; without effect where the trainer has ended."""
        try:
            _put(self._records, f"{to}/{self._rank}", said)
        except (RuntimeError, NotAuthentic):
            _log.exception("the trainer cannot be informed")

    def join(self, model: torch.nn.Module) -> None:
        """Report the slices that this rank of the model needs, and join the group."""
        self._model = model
        self._device = next(model.parameters()).device
        expected_tensors = json.loads(self._records.get("tensors"))
        self._dtype = getattr(torch, expected_tensors["dtype"])
        try:
            others = {name: getattr(torch, dtype) for name, dtype in expected_tensors["dtypes"].items()}
            self._places = trace(model, expected_tensors["shapes"], self._dtype, others)
        except Exception as error:  # whatever stops the trace, a broadcast calls the same loader without it
            raise ValueError(f"{error}; {NOT_FOLLOWED}") from error
        self._needs = needs_table([place.need for place in self._places], list(expected_tensors["shapes"]))
        self._records.set(f"needs/{self._rank}", pack_needs(self._needs))
        with self._while_wanted():
            # NCCL blocks the thread that connects a group until all members have come: that is not this thread.
            joining = in_background("join", self._joined)
            while not wait([joining], _WATCH_S).done and not self._broken.is_set():
                continue
            if joining.done():
                self._group = joining.result()

    def _joined(self) -> dist.ProcessGroup:
        """Return the group, connected by its first operation."""
        command = self._command
        with on_device(self._device):
            group = init_custom_process_group(
                backend=command["backend"],
                store=dist.PrefixStore(command["group"], _connection(command)),
                world_size=command["world_size"],
                rank=self._rank,
                group_name=command["group"],
                timeout=timedelta(seconds=command["timeout_s"]),
            )
            dist.all_reduce(torch.zeros(1, device=self._device), group=group)
            return group

    def leave(self) -> None:
        """Leave the group together with the other members."""
        group, self._group = self._group, None
        if group is not None:
            destroy(group, self._command["deadline_s"])

    def abort(self) -> None:
        """Abort the group, whatever is in flight in it."""
        self._broken.set()
        group, self._group = self._group, None
        if group is not None:
            abort(group)

    @contextmanager
    def _while_wanted(self) -> Iterator[None]:
        """Abort the group as soon as the trainer aborts it or has ended. Raises RuntimeError then, at the end."""
        done, records = threading.Event(), _records(self._command)

        def watch() -> None:
            while not done.wait(_WATCH_S):
                try:
                    given_up = records.has(ABORTED)
                except RuntimeError:
                    given_up = True
                if given_up:
                    self.abort()
                    return

        watching = in_background("watch", watch)
        try:
            yield
        finally:
            done.set()
            watching.result()
        if self._broken.is_set():
            raise RuntimeError("the trainer has aborted this sync")

    @torch.no_grad()
    def receive(self) -> None:
        """Receive one version of the weights."""
        if self._transfers is None:
            self._transfers = unpack_transfers(self._records.get(f"transfers/{self._rank}"), self._needs)
        parameters = dict(self._model.named_parameters())
        views = [place.view(parameters) for place in self._places]
        buffers = StagingBuffers(self._dtype, self._device)
        copies: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def begin(slot: int, transfers: list[Transfer]) -> list[dist.P2POp]:
            wanted = [[_cut(views[part.of], part) for part in transfer.parts] for transfer in transfers]
            pieces, copies[slot] = buffers.take(slot, wanted)
            return [
                dist.P2POp(dist.irecv, piece, group=self._group, group_peer=transfer.peer)
                for piece, transfer in zip(pieces, transfers, strict=True)
            ]

        def end(slot: int) -> None:
            for part, arrived in copies[slot]:
                part.copy_(arrived)

        with self._while_wanted():
            run_rounds(self._transfers.rounds(), begin, end)
            _refresh_copies(self._model)
            if self._device.type == "cuda":
                torch.cuda.synchronize()


def _refresh_copies(model: torch.nn.Module) -> None:
    """Bring up to date what SGLang computes of weights in their own loaders: norms with 1 added (GemmaRMSNorm)."""
    for module in model.modules():
        if refresh := getattr(module, "refresh_gemma_weight", None):
            refresh()


def _cut(view: torch.Tensor, part: Slice) -> torch.Tensor:
    return view.narrow(0, part.row, part.rows).narrow(1, part.column, part.columns)
