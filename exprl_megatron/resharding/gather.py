"""From the shards of all ranks to full tensors under their Hugging Face names, a bucket at a time."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.architecture import Architecture
from exprl_megatron.policy.world import World
from exprl_megatron.resharding.names import Parameter, hf_shapes, parameters
from exprl_megatron.resharding.transport import Bucket


def bucket_plan(architecture: Architecture, layout: Layout, itemsize: int, bucket_bytes: int) -> list[list[Parameter]]:
    """The exported parameters in order, cut into buckets of at most `bucket_bytes` (more where one alone has more)."""
    shapes = hf_shapes(architecture)
    exported = [parameter for parameter in parameters(architecture, layout) if parameter.exported]
    cuts, filled = [0], 0
    for index, parameter in enumerate(exported):
        size = itemsize * sum(torch.Size(shapes[name]).numel() for name in parameter.hf_names)
        if filled and filled + size > bucket_bytes:
            cuts.append(index)
            filled = 0
        filled += size
    return [exported[start:stop] for start, stop in pairwise([*cuts, len(exported)])]


def gather_buckets(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, world: World, bucket_bytes: int
) -> Iterator[Bucket]:
    """Yields lists of (Hugging Face name, full tensor on this device) on rank 0, and as many empty lists elsewhere.

    A collective: every rank must iterate to the end. `chunks` are this rank's unwrapped model chunks. Between
    two yields rank 0 holds about one bucket; the tensors are its own to keep.
    """
    local = [dict(chunk.named_parameters()) for chunk in chunks]
    dtype = next(iter(local[0].values())).dtype
    shapes = hf_shapes(architecture)
    for bucket in bucket_plan(architecture, world.layout, dtype.itemsize, bucket_bytes):
        gathered: Bucket = []
        for parameter in bucket:
            full = None
            if world.dp_rank == 0 and world.pp_rank == parameter.pp_rank:
                full = _join(local[parameter.chunk][parameter.name], parameter, world)
            if world.dp_rank == 0 and world.tp_rank == 0 and parameter.pp_rank != 0:
                full = _move_to_first_stage(
                    full, [shapes[name] for name in parameter.hf_names], dtype, parameter, world
                )
            if world.rank == 0:
                gathered.extend(zip(parameter.hf_names, full, strict=True))
        yield gathered


@torch.no_grad()
def _join(shard: torch.Tensor, parameter: Parameter, world: World) -> tuple[torch.Tensor, ...] | None:
    """The full tensors on tensor-parallel rank 0 of this stage, None on its other ranks."""
    shard = shard.detach()
    if parameter.rule.split_dim is None:
        return (shard.clone(),) if world.tp_rank == 0 else None
    if world.layout.tp == 1:
        return parameter.rule.join([shard])
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(world.layout.tp)] if world.tp_rank == 0 else None
    dist.gather(shard.contiguous(), shards, group_dst=0, group=group)
    return None if shards is None else parameter.rule.join(shards)


def _move_to_first_stage(
    full: tuple[torch.Tensor, ...] | None,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    parameter: Parameter,
    world: World,
) -> tuple[torch.Tensor, ...] | None:
    """Sends the tensors along the pipeline from the stage that has them to stage 0."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if world.pp_rank == parameter.pp_rank:
        for tensor in full:
            dist.send(tensor.contiguous(), group=group, group_dst=0)
    elif world.pp_rank == 0:
        full = tuple(torch.empty(shape, dtype=dtype, device=world.device) for shape in shapes)
        for tensor in full:
            dist.recv(tensor, group=group, group_src=parameter.pp_rank)
    return full
