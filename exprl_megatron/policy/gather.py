"""Gathers the shards of all ranks into full tensors under their Hugging Face names, a bucket at a time."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Bucket, Parameter, dtype_of, hf_shapes, parameters
from exprl_megatron.models.rules import spans
from exprl_megatron.models.shards import holders, is_contiguous_shard, shard_shape, split_into_buckets
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.precision import dequantized
from exprl_megatron.policy.world import World
from exprl_megatron.utils.required import required


class Gatherer:
    """Joins parameters of this rank's unwrapped model chunks with the other ranks' shards, on a given rank."""

    def __init__(self, chunks: Sequence[torch.nn.Module], architecture: Architecture, world: World):
        self._local = [dict(named_weights(chunk)) for chunk in chunks]
        self._world = world
        self._scratch = torch.empty(0, device=world.device)
        self.shapes = hf_shapes(architecture)
        """Of all Hugging Face tensors."""
        # Of parameters; buffers come after them.
        self.dtype = next(iter(self._local[0].values())).dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which the Hugging Face tensor `name` is gathered."""
        return getattr(torch, dtype_of(name, str(self.dtype).removeprefix("torch.")))

    @torch.no_grad()
    def collect(self, parameter: Parameter, root: int, into: Sequence[torch.Tensor] | None) -> None:
        """Gather a parameter's full Hugging Face tensors, in order, into the tensors `into` of their shapes and dtypes.

        `into` is needed on rank `root`, and None elsewhere. A collective of `root` and the parameter's holders; the
        others do
        nothing. Besides `into`, root holds at most one shard.
        """
        ranks = holders(parameter, self._world.layout)
        if self._world.rank == root:
            target = required(into, "the memory of the gathered tensors")
            for index, rank in enumerate(ranks):
                if rank == root:
                    _place(parameter, self.own(parameter), target, index, len(ranks))
                else:
                    self._receive(parameter, rank, target, index)
        elif self._world.rank in ranks:
            dist.send(self.own(parameter).contiguous(), dst=root)

    def own(self, parameter: Parameter) -> torch.Tensor:
        """Return this rank's shard, which it must hold, in numbers of its tensors' dtype."""
        return dequantized(self._local[parameter.chunk][parameter.name].detach())

    def _receive(self, parameter: Parameter, rank: int, into: Sequence[torch.Tensor], index: int) -> None:
        """Receive the `index`-th shard from `rank` into its place, through memory that the next one reuses if
        need be.
        """
        layout = self._world.layout
        shape = torch.Size(shard_shape(parameter, self.shapes, layout))
        if is_contiguous_shard(parameter, self.shapes, layout, index):
            dist.recv(into[0].narrow(0, index * shape[0], shape[0]), src=rank)
            return
        if self._scratch.numel() < shape.numel():
            self._scratch = torch.empty(shape.numel(), dtype=self.dtype, device=self._world.device)
        shard = self._scratch[: shape.numel()].view(shape)
        dist.recv(shard, src=rank)
        _place(parameter, shard, into, index, len(holders(parameter, layout)))


def bucket_plan(
    architecture: Architecture, layout: Layout, itemsize: int, bucket_bytes: int, grouped: bool = False
) -> list[list[Parameter]]:
    """Return the exported parameters in order, cut into buckets of at most `bucket_bytes` (more where one alone has
    more).

    `grouped` is as in names.parameters.
    """
    shapes = hf_shapes(architecture)
    exported = (parameter for parameter in parameters(architecture, layout, grouped) if parameter.exported)
    return split_into_buckets(
        exported, lambda p: itemsize * sum(torch.Size(shapes[name]).numel() for name in p.hf_names), bucket_bytes
    )


def gather_buckets(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, world: World, bucket_bytes: int
) -> Iterator[Bucket]:
    """Yield lists of (Hugging Face name, full tensor on this device) on rank 0, and as many empty lists elsewhere.

    A collective: every rank must iterate to the end. `chunks` are this rank's unwrapped model chunks. Between
    two yields rank 0 holds about one bucket; the tensors are its own to keep.
    """
    gatherer = Gatherer(chunks, architecture, world)
    grouped = world.device.type == "cuda"
    for bucket in bucket_plan(architecture, world.layout, gatherer.dtype.itemsize, bucket_bytes, grouped):
        gathered: Bucket = []
        for parameter in bucket:
            into = None
            if world.rank == 0:
                into = [
                    torch.empty(gatherer.shapes[name], dtype=gatherer.dtype_of(name), device=world.device)
                    for name in parameter.hf_names
                ]
                gathered.extend(zip(parameter.hf_names, into, strict=True))
            gatherer.collect(parameter, 0, into)
        yield gathered


def _place(parameter: Parameter, shard: torch.Tensor, into: Sequence[torch.Tensor], index: int, ranks: int) -> None:
    """Copy the `index`-th of `ranks` shards of a parameter to where it belongs in the full tensors."""
    rule, dim = parameter.rule, parameter.rule.split_dim
    for number, (tensor, part) in enumerate(zip(into, rule.parts(shard), strict=True)):
        if dim is None:
            tensor.copy_(part)
            continue
        # The last parts of a vocabulary may be padding.
        placed = 0
        for start, stop in spans(rule, number, tensor.shape[dim], index, ranks):
            tensor.narrow(dim, start, stop - start).copy_(part.narrow(dim, placed, stop - start))
            placed += stop - start
