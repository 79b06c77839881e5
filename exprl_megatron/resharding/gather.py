"""From the shards of all ranks to full tensors under their Hugging Face names, a bucket at a time."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.architecture import Architecture
from exprl_megatron.policy.precision import plain
from exprl_megatron.policy.world import World
from exprl_megatron.resharding.names import Parameter, hf_shapes, parameters
from exprl_megatron.resharding.transport import Bucket


def bucket_plan(
    architecture: Architecture, layout: Layout, itemsize: int, bucket_bytes: int, grouped: bool = False
) -> list[list[Parameter]]:
    """The exported parameters in order, cut into buckets of at most `bucket_bytes` (more where one alone has more).

    `grouped` is as in names.parameters.
    """
    shapes = hf_shapes(architecture)
    exported = [parameter for parameter in parameters(architecture, layout, grouped) if parameter.exported]
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
    grouped = world.device.type == "cuda"
    for bucket in bucket_plan(architecture, world.layout, dtype.itemsize, bucket_bytes, grouped):
        gathered: Bucket = []
        for parameter in bucket:
            full = None
            if _holds_first_copy(parameter, world):
                full = _join(local[parameter.chunk][parameter.name], parameter, world)
            for group, source in _way_to_first_rank(parameter, world):
                full = _move(full, [shapes[name] for name in parameter.hf_names], dtype, world, group, source)
            if world.rank == 0:
                gathered.extend(zip(parameter.hf_names, full, strict=True))
        yield gathered


def _holds_first_copy(parameter: Parameter, world: World) -> bool:
    """Whether this rank has a part of the parameter, and the first of several copies of that part."""
    if world.pp_rank != parameter.pp_rank:
        return False
    if parameter.ep_rank is None:
        return world.dp_rank == world.cp_rank == 0
    return world.ep_rank == parameter.ep_rank and parallel_state.get_expert_data_parallel_rank() == 0


def _way_to_first_rank(parameter: Parameter, world: World) -> list[tuple[dist.ProcessGroup, int]]:
    """The moves from the rank that has the joined tensors to rank 0 in which this rank takes part.

    A move goes from the given rank of the group to its rank 0: first from expert-parallel rank to
    expert-parallel rank within the stage, then from the stage to the first stage.
    """
    moves = []
    expert_root = world.etp_rank == 0 and parallel_state.get_expert_data_parallel_rank() == 0
    if parameter.ep_rank and world.pp_rank == parameter.pp_rank and expert_root:
        moves.append((parallel_state.get_expert_model_parallel_group(), parameter.ep_rank))
    if parameter.pp_rank and world.tp_rank == world.cp_rank == world.dp_rank == 0:
        moves.append((parallel_state.get_pipeline_model_parallel_group(), parameter.pp_rank))
    return moves


@torch.no_grad()
def _join(shard: torch.Tensor, parameter: Parameter, world: World) -> tuple[torch.Tensor, ...] | None:
    """The full tensors on the first of the ranks among which the parameter is cut, None on the others."""
    if parameter.ep_rank is None:
        rank, ranks, group = world.tp_rank, world.layout.tp, parallel_state.get_tensor_model_parallel_group()
    else:
        rank, ranks, group = world.etp_rank, world.layout.etp, parallel_state.get_expert_tensor_parallel_group()
    shard = plain(shard.detach())
    if parameter.rule.split_dim is None:
        return (shard.clone(),) if rank == 0 else None
    if ranks == 1:
        return parameter.rule.join([shard])
    shards = [torch.empty_like(shard) for _ in range(ranks)] if rank == 0 else None
    dist.gather(shard.contiguous(), shards, group_dst=0, group=group)
    return None if shards is None else parameter.rule.join(shards)


def _move(
    full: tuple[torch.Tensor, ...] | None,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    world: World,
    group: dist.ProcessGroup,
    source: int,
) -> tuple[torch.Tensor, ...] | None:
    """Sends the tensors from rank `source` of the group to its rank 0; its other ranks do nothing."""
    if group.rank() == source:
        for tensor in full:
            dist.send(tensor.contiguous(), group=group, group_dst=0)
    elif group.rank() == 0:
        full = tuple(torch.empty(shape, dtype=dtype, device=world.device) for shape in shapes)
        for tensor in full:
            dist.recv(tensor, group=group, group_src=source)
    return full
