"""A sampling server played by a member: like SGLang it forms groups and receives as it is asked, in one thread."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from exprl_megatron.config.policy import Layout
from exprl_megatron.weight_sync.groups import init_group
from exprl_megatron.weight_sync.messages import Message, TensorSlot
from exprl_megatron.weight_sync.weight_exporter import FilledBucket

WORLD = SimpleNamespace(rank=0, pp_rank=0, layout=Layout(), device=torch.device("cpu"))
CONTROL = SimpleNamespace(abort_on_error=nullcontext, signal=lambda payload=None: None, collect=lambda item: [item])
"""Rank 0 is the trainer's only rank."""


class Asker:
    """In place of rank 0's client: the default group carries what is asked to rank 1, and its answer back."""

    url, name = "http://127.0.0.1:9", "policy-0"

    async def init_weights_group(self, **settings) -> None:
        await self._ask("form", settings)

    async def update_from_distributed(self, names, dtypes, shapes, *, group, version, **settings) -> None:
        sizes = [
            torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        await self._ask("receive", {"group": group, "nbytes": sum(sizes), "version": version})

    async def destroy_weights_group(self, group: str, **_) -> None:
        await self._ask("destroy", {"group": group})

    async def begin_weight_update(self, **_) -> None:
        return None

    end_weight_update = begin_weight_update

    async def end(self) -> None:
        await self._ask("end", {})

    async def _ask(self, what: str, settings: dict[str, Any]) -> None:
        def exchange() -> None:
            dist.broadcast_object_list([(what, settings)], 0)
            dist.broadcast_object_list([None], 1)

        await asyncio.to_thread(exchange)


def serve() -> list[tuple[str | None, int]]:
    """Do what rank 0 asks, until it has enough; the versions of what was received, and the sums of the bytes."""
    groups: dict[str, dist.ProcessGroup] = {}
    received = []
    while True:
        box = [None]
        dist.broadcast_object_list(box, 0)
        what, settings = box[0]
        if what == "form":
            place = settings["master_address"], settings["master_port"]
            size = settings["rank_offset"], settings["world_size"]
            groups[settings["group"]] = init_group(settings["group"], *place, *size, settings["deadline_s"])
        elif what == "receive":
            data = torch.empty(settings["nbytes"], dtype=torch.uint8)
            dist.broadcast(data, group=groups[settings["group"]], group_src=0)
            received.append((settings["version"], int(data.sum())))
        elif what == "destroy":
            dist.destroy_process_group(groups.pop(settings["group"]))
        dist.broadcast_object_list([None], 1)
        if what == "end":
            return received


def exporter(count: int) -> SimpleNamespace:
    """Messages of 64 bytes: of ones, twos, and so on; the smallest one is of zeros."""
    rounds = [(Message(0, (), (TensorSlot(f"w{i}", "float32", (4, 4), 0),)),) for i in range(count)]
    return SimpleNamespace(
        rounds=rounds,
        smallest_messages=[rounds[0][0]],
        gather=lambda number: FilledBucket(rounds[number][0], torch.full((64,), number + 1, dtype=torch.uint8)),
        gather_smallest=lambda stage: FilledBucket(rounds[0][0], torch.zeros(64, dtype=torch.uint8)),
    )
