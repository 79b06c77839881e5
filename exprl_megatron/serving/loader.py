"""Runs in SGLang's processes: receives weights from the trainer's ranks straight into the model's parameters.

An order without the key's code is logged and has no effect (see OrderGate). One that fails is reported to the trainer
through its store, and logged: an exception would end the server.
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

from exprl_megatron.serving.delivery_rounds import Lanes, in_rounds
from exprl_megatron.serving.delivery_tables import (
    Deliveries,
    Delivery,
    Part,
    needs_table,
    pack_needs,
    unpack_deliveries,
)
from exprl_megatron.serving.loader_orders import BROKEN_OFF, NOT_FOLLOWED, RECORDS, OrderGate, OrderRefused
from exprl_megatron.serving.loader_trace import trace
from exprl_megatron.serving.model_checksums import Report, checksums
from exprl_megatron.serving.own_group import abort, destroy, in_background, on_device
from exprl_megatron.utils.authentication import NotAuthentic
from exprl_megatron.utils.keyed_store import Records, reached_store

_log = logging.getLogger(__name__)
_CONNECT_S = 30.0
_WATCH_S = 0.2
_member: "_Member | None" = None
_gate: OrderGate | None = None
_expected: tuple[str, bytes] = ("", b"")
"""What the trainer expects our parameters to be, under its name in the trainer's store."""


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader: carries out the order that stands for the only tensor's name.

    `join` makes this rank a member of the trainer's group in the place of any before, and tells what it holds;
    `receive` fills the parameters; `leave` ends the membership; `finish` does nothing: the update that carries it gives
    the weights their version. `checksums` reports those of the parameters, of members and others alike.
    """
    global _member, _gate
    if _gate is None:
        _gate = OrderGate(get_server_args().api_key, get_device().random_seed)
    try:
        order = _gate.admit(named_tensors[0][0])
    except OrderRefused as refusal:
        _log.error("an order to the weight loader is refused: %s", refusal)
        return
    if order["do"] == "checksums":
        return _report_checksums(model, order)
    said = ""
    try:
        if order["do"] == "join":
            former, _member = _member, None
            if former is not None:
                former.break_off()
            _member = _Member(order)
            _member.join(model)
        elif order["do"] == "receive":
            _member.receive()
        elif order["do"] == "leave":
            _member.leave()
    except Exception as error:  # SGLang's process would end with it
        _log.exception("the order to %s weights failed", order["do"])
        said = f"{type(error).__name__}: {error}"
    if _member is not None:
        _member.answer(order["answer"], said)


def _report_checksums(model: torch.nn.Module, order: dict[str, Any]) -> None:
    """Puts what the parameters' checksums are, or why there are none, into the trainer's store."""
    global _expected
    try:
        records = _records(order)
        try:
            if _expected[0] != order["expected"]:
                _expected = order["expected"], records.get(order["expected"])
            report = Report(checksums(_compared(model), _expected[1]))
        except Exception as error:  # SGLang's process would end with it
            _log.exception("the checksums of the weights failed")
            report = Report(error=f"{type(error).__name__}: {error}")
        _put(records, order["answer"], msgspec.msgpack.encode(report))
    except (RuntimeError, NotAuthentic):
        _log.exception("the trainer cannot be informed")


def _compared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What of the model SGLang's own check of weights compares: all but buffers that follow from the config."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in tensors if not _is_skip_weight_check(name, tensor)}


def _connection(order: dict[str, Any]) -> dist.TCPStore:
    """To the trainer's store. A call that waits there keeps others that use the same connection waiting."""
    # The trainer waits for us: it is there at once or not at all.
    return reached_store(order["address"], order["port"], min(_CONNECT_S, order["deadline_s"]))


def _records(order: dict[str, Any]) -> Records:
    """What trainer and servers write there, on a connection of its own."""
    return Records(_connection(order), order["secret"], RECORDS)


def _put(records: Records, name: str, value: str | bytes) -> None:
    records.set(name, value)
    # A set is not acknowledged; without a reply, the trainer could look before another rank's answer is there.
    records.get(name)


class _Member:
    """This rank among those of one trainer and all its servers."""

    def __init__(self, order: dict[str, Any]):
        self._order = order
        self._records = _records(order)
        self._rank = order["rank"]
        self._group: dist.ProcessGroup | None = None
        self._deliveries: Deliveries | None = None
        self._broken = threading.Event()

    def answer(self, to: str, said: str) -> None:
        """What became of an order, "" if all is well; in vain where the trainer is gone."""
        try:
            _put(self._records, f"{to}/{self._rank}", said)
        except (RuntimeError, NotAuthentic):
            _log.exception("the trainer cannot be informed")

    def join(self, model: torch.nn.Module) -> None:
        """Tell what the model's rank needs, and meet the others."""
        self._model = model
        self._device = next(model.parameters()).device
        told = json.loads(self._records.get("tensors"))
        self._dtype = getattr(torch, told["dtype"])
        try:
            others = {name: getattr(torch, dtype) for name, dtype in told["dtypes"].items()}
            self._places = trace(model, told["shapes"], self._dtype, others)
        except Exception as error:  # whatever stops the trace, a broadcast calls the same loader without it
            raise ValueError(f"{error}; {NOT_FOLLOWED}") from error
        self._needs = needs_table([place.need for place in self._places], list(told["shapes"]))
        self._records.set(f"needs/{self._rank}", pack_needs(self._needs))
        with self._while_wanted():
            # NCCL blocks the thread that connects a group until all members have come: that is not this thread.
            joining = in_background("join", self._joined)
            while not wait([joining], _WATCH_S).done and not self._broken.is_set():
                continue
            if joining.done():
                self._group = joining.result()

    def _joined(self) -> dist.ProcessGroup:
        """The group, connected by its first operation."""
        order = self._order
        with on_device(self._device):
            group = init_custom_process_group(
                backend=order["backend"],
                store=dist.PrefixStore(order["group"], _connection(order)),
                world_size=order["world_size"],
                rank=self._rank,
                group_name=order["group"],
                timeout=timedelta(seconds=order["timeout_s"]),
            )
            dist.all_reduce(torch.zeros(1, device=self._device), group=group)
            return group

    def leave(self) -> None:
        """Give the group up while the others do."""
        group, self._group = self._group, None
        if group is not None:
            destroy(group, self._order["deadline_s"])

    def break_off(self) -> None:
        """Give the group up, whatever is in flight in it."""
        self._broken.set()
        group, self._group = self._group, None
        if group is not None:
            abort(group)

    @contextmanager
    def _while_wanted(self) -> Iterator[None]:
        """Break the group off as soon as the trainer does, or is gone. Raises RuntimeError then, at the end."""
        done, records = threading.Event(), _records(self._order)

        def watch() -> None:
            while not done.wait(_WATCH_S):
                try:
                    given_up = records.has(BROKEN_OFF)
                except RuntimeError:
                    given_up = True
                if given_up:
                    self.break_off()
                    return

        watching = in_background("watch", watch)
        try:
            yield
        finally:
            done.set()
            watching.result()
        if self._broken.is_set():
            raise RuntimeError("the trainer has given this sync up")

    @torch.no_grad()
    def receive(self) -> None:
        """One version of the weights."""
        if self._deliveries is None:
            self._deliveries = unpack_deliveries(self._records.get(f"deliveries/{self._rank}"), self._needs)
        parameters = dict(self._model.named_parameters())
        views = [place.view(parameters) for place in self._places]
        lanes = Lanes(self._dtype, self._device)
        copies: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def begin(lane: int, deliveries: list[Delivery]) -> list[dist.P2POp]:
            wanted = [[_cut(views[part.of], part) for part in delivery.parts] for delivery in deliveries]
            pieces, copies[lane] = lanes.take(lane, wanted)
            return [
                dist.P2POp(dist.irecv, piece, group=self._group, group_peer=delivery.peer)
                for piece, delivery in zip(pieces, deliveries, strict=True)
            ]

        def end(lane: int) -> None:
            for part, arrived in copies[lane]:
                part.copy_(arrived)

        with self._while_wanted():
            in_rounds(self._deliveries.rounds(), begin, end)
            if self._device.type == "cuda":
                torch.cuda.synchronize()


def _cut(view: torch.Tensor, part: Part) -> torch.Tensor:
    return view.narrow(0, part.row, part.rows).narrow(1, part.column, part.columns)
