"""The process group: what torch.distributed calls, turned into operations of communicators."""

import functools
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from nccl_like.communicator import Broken, Call, Communicator, Work

COLLECTIVES = ("broadcast", "allreduce", "allreduce_coalesced", "reduce", "barrier")
COLLECTIVES += ("allgather", "_allgather_base", "all_gather_single", "allgather_coalesced")
COLLECTIVES += ("allgather_into_tensor_coalesced", "all_gather_single_coalesced", "gather", "gather_single", "scatter")
COLLECTIVES += ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced")
COLLECTIVES += ("reduce_scatter_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single")
UNEVEN = ("alltoall", "alltoall_base", "all_to_all_single")
"""Operations in which members may have different numbers of elements."""


class NcclLikeGroup(dist.ProcessGroup):
    """See the package."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(store, rank, size)
        self._own_store, self._own_rank, self._own_size, self._timeout = store, rank, size, timeout
        self._communicators: dict[str, Communicator] = {}
        self._batch: list[tuple[str, list[torch.Tensor], int]] | None = None
        self._over = False
        self._title = "?"

    supports_coalescing = True

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def name(self) -> str:
        return "nccl_like"

    def _get_backend_name(self) -> str:
        return "nccl_like"

    def _set_group_name(self, name: str) -> None:
        self._title = name

    @property
    def group_name(self) -> str:
        return self._title

    def _get_backend(self, device: torch.device) -> "NcclLikeGroup":
        return self

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work | None:
        return self._point("send", tensors, rank)

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work | None:
        return self._point("recv", tensors, rank)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> Work:
        raise Broken("NCCL cannot receive from any source")

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> Work:
        batch, self._batch = self._batch, None
        work = self._work("batch of " + ", ".join(f"{kind} with {rank}" for kind, _, rank in batch))
        call = Call("", lambda gloo: _run_batch(gloo, batch, self._own_rank, work.what), work, alone=True)
        self._communicator("all").call(call)
        return work

    def abort(self) -> None:
        """Operations in flight fail here. A thread that is in a group's first operation stays there."""
        self._over = True
        for communicator in list(self._communicators.values()):
            communicator.abort()

    def shutdown(self) -> None:
        if self._over:
            return
        for key in sorted(self._communicators):
            self._communicators[key].destroy()
        self._over = True

    def _point(self, kind: str, tensors: list[torch.Tensor], peer: int) -> Work | None:
        if self._batch is not None:
            self._batch.append((kind, tensors, peer))
            return None
        me = self._own_rank
        low, high = sorted((me, peer))
        ends = (me, peer) if kind == "send" else (peer, me)
        signature = f"{ends[0]} sends to {ends[1]}: {_sizes(tensors)}"
        work = self._work(f"{kind} with {peer}")
        inner = 0 if peer < me else 1
        run = functools.partial(_run_point, kind, tensors, inner)
        self._communicator(f"{low}-{high}", (low, high)).call(Call(signature, run, work))
        return work

    def _collective(self, name: str, args: tuple, kwargs: dict) -> Work:
        signature = f"{name} {_alike(name, (*args, *kwargs.values()))}"
        work = self._work(signature)
        self._communicator("all").call(Call(signature, lambda gloo: getattr(gloo, name)(*args, **kwargs).wait(), work))
        return work

    def _communicator(self, key: str, members: tuple[int, ...] | None = None) -> Communicator:
        if key not in self._communicators:
            ranks = members or tuple(range(self._own_size))
            store = dist.PrefixStore(f"nccl_like/{key}", self._own_store)
            title = f"group {self._title} ({key})"
            self._communicators[key] = Communicator(title, store, ranks, ranks.index(self._own_rank))
        return self._communicators[key]

    def _work(self, what: str) -> Work:
        if self._over:
            raise Broken(f"{what}: the group was destroyed or aborted")
        return Work(what, self._timeout)


def _collective(name: str):
    def call(self, *args, **kwargs):
        return self._collective(name, args, kwargs)

    call.__name__ = name
    return call


for _name in COLLECTIVES:
    setattr(NcclLikeGroup, _name, _collective(_name))


def _run_point(kind: str, tensors: list[torch.Tensor], peer: int, gloo: dist.ProcessGroup) -> None:
    getattr(gloo, kind)(tensors, peer, 0).wait()


def _run_batch(gloo: dist.ProcessGroup, batch: list, rank: int, what: str) -> None:
    """All of a batch at the same time; first each sender says how much it sends."""
    said = [torch.tensor(_size(tensors)) if kind == "send" else torch.zeros(2).long() for kind, tensors, _ in batch]
    _all_points(gloo, [(kind, [head], peer) for (kind, _, peer), head in zip(batch, said, strict=True)])
    for (kind, tensors, peer), head in zip(batch, said, strict=True):
        if kind == "recv" and head.tolist() != _size(tensors):
            raise Broken(f"{what}: rank {rank} expects {_sizes(tensors)} of rank {peer}, which sends {head.tolist()}")
    _all_points(gloo, batch)


def _all_points(gloo: dist.ProcessGroup, points: list) -> None:
    works = [getattr(gloo, kind)(tensors, peer, 1) for kind, tensors, peer in points]
    for work in works:
        work.wait()


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _sizes(value) -> str:
    return ", ".join(f"{tensor.numel()} x {tensor.dtype}" for tensor in _tensors(value))


def _size(tensors: list[torch.Tensor]) -> list[int]:
    """[elements, dtype] as numbers."""
    return [tensors[0].numel(), sum(map(ord, str(tensors[0].dtype)))]


def _alike(name: str, args: tuple) -> str:
    """What all members must agree on."""
    options = [f"root {args[-1].rootRank}"] if hasattr(args[-1], "rootRank") else []
    options += [str(args[-1].reduceOp.op)] if hasattr(args[-1], "reduceOp") else []
    if name in UNEVEN:
        shown = " ".join(sorted({str(tensor.dtype) for tensor in _tensors(args)}))
    else:
        # Only the root has a gather's results, and a scatter's sources.
        shown = _sizes(args[1] if name.startswith("gather") else args[0] if name == "scatter" else args)
    return " ".join([shown, *options])
