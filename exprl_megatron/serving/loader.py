"""Runs in SGLang's processes: receives weights from the trainer's ranks straight into the model's parameters.

An order that fails is told to the trainer by way of its store, and logged: an exception would end the server.
"""

import json
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.utils.common import init_custom_process_group

from exprl_megatron.serving.delivery_rounds import Lanes, in_rounds
from exprl_megatron.serving.loader_orders import NOT_FOLLOWED, Delivery, Part
from exprl_megatron.serving.loader_trace import trace

_log = logging.getLogger(__name__)
_CONNECT_S = 30.0
_member: "_Member | None" = None


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom weight loader: carries out the order that stands for the only tensor's name.

    `join` makes this rank a member of the trainer's group in the place of any before, and tells what it holds;
    `receive` fills the parameters; `leave` ends the membership; `finish` does nothing: the update that carries it gives
    the weights their version.
    """
    global _member
    order = json.loads(named_tensors[0][0])
    said = ""
    try:
        if order["do"] == "join":
            former, _member = _member, None
            if former is not None:
                former.leave()
            _member = _Member(order)
            _member.join(model, order)
        elif order["do"] == "receive":
            _member.receive()
        elif order["do"] == "leave":
            _member.leave()
    except Exception as error:  # SGLang's process would end with it
        _log.exception("the order to %s weights failed", order["do"])
        said = f"{type(error).__name__}: {error}"
    if _member is not None:
        _member.answer(order["answer"], said)


class _Member:
    """This rank among those of one trainer and all its servers."""

    def __init__(self, order: dict[str, Any]):
        # The trainer waits for us: it is there at once or not at all.
        timeout = timedelta(seconds=min(_CONNECT_S, order["deadline_s"]))
        self._store = dist.TCPStore(
            order["address"], order["port"], is_master=False, timeout=timeout, wait_for_workers=False
        )
        self._rank = order["rank"]
        self._group: dist.ProcessGroup | None = None
        self._deliveries: list[Delivery] | None = None

    def answer(self, to: str, said: str) -> None:
        """What became of an order, "" if all is well; in vain where the trainer is gone."""
        try:
            self._store.set(f"{to}/{self._rank}", said)
        except RuntimeError:
            _log.exception("the trainer cannot be told")

    def join(self, model: torch.nn.Module, order: dict[str, Any]) -> None:
        """Tell what the model's rank needs, and meet the others."""
        self._model = model
        self._device = next(model.parameters()).device
        told = json.loads(self._store.get("tensors"))
        self._dtype = getattr(torch, told["dtype"])
        try:
            self._places = trace(model, told["shapes"], self._dtype)
        except Exception as error:  # whatever stops the trace, a broadcast calls the same loader without it
            raise ValueError(f"{error}; {NOT_FOLLOWED}") from error
        self._store.set(f"needs/{self._rank}", json.dumps([place.need for place in self._places]))
        self._group = init_custom_process_group(
            backend=order["backend"],
            store=dist.PrefixStore(order["group"], self._store),
            world_size=order["world_size"],
            rank=self._rank,
            group_name=order["group"],
            timeout=timedelta(seconds=order["deadline_s"]),
        )
        # NCCL wants every member in the first thing that a group does.
        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)

    def leave(self) -> None:
        """Give the group up."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    @torch.no_grad()
    def receive(self) -> None:
        """One version of the weights."""
        if self._deliveries is None:
            told = json.loads(self._store.get(f"deliveries/{self._rank}"))
            self._deliveries = [Delivery(*head, tuple(Part(*part) for part in parts)) for *head, parts in told]
        parameters = dict(self._model.named_parameters())
        views = [place.view(parameters) for place in self._places]
        lanes = Lanes(self._dtype, self._device)
        copies: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

        def begin(lane: int, deliveries: list[Delivery]) -> list[dist.P2POp]:
            wanted = [[_cut(views[part.need], part) for part in delivery.parts] for delivery in deliveries]
            pieces, copies[lane] = lanes.take(lane, wanted)
            return [
                dist.P2POp(dist.irecv, piece, group=self._group, group_peer=delivery.source)
                for piece, delivery in zip(pieces, deliveries, strict=True)
            ]

        def end(lane: int) -> None:
            for part, arrived in copies[lane]:
                part.copy_(arrived)

        in_rounds(self._deliveries, begin, end)
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _cut(view: torch.Tensor, part: Part) -> torch.Tensor:
    return view.narrow(0, part.row, part.rows).narrow(1, part.column, part.columns)
