"""Plans a sync by `direct` at any size from its transfers: their bytes, the links that they use, and its seconds.

Every rank of trainer and servers has a network card; all links work at once, each at the share of its rate that NCCL
reaches.
"""

from functools import lru_cache

import numpy as np

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.shards import ITEMSIZE
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.links import NIC_EFFICIENCY
from exprl_megatron.planning.sync_broadcast import MESSAGE_S, TENSOR_S, SyncPlan, shard_bytes
from exprl_megatron.serving.sharding import server_needs
from exprl_megatron.serving.transfer_tables import RankTransfers, needs_table
from exprl_megatron.weight_sync.p2p_schedule import TransferPlan, Volumes
from exprl_megatron.weight_sync.shard_table import ShardTable, shard_table

_REQUESTS = 4
"""Of a sync to a server: begin, receive, finish, end."""


def plan_direct(
    architecture: Architecture,
    layout: Layout,
    dtype: str,
    bucket_bytes: int,
    gpu: Gpu,
    *,
    servers: int,
    server_tp: int,
) -> SyncPlan:
    """Return the plan of a sync to `servers` servers of `server_tp` ranks on nodes of their own."""
    plan = _transfers(architecture, layout, dtype, bucket_bytes, servers, server_tp)
    volumes = plan.volumes()
    cards = {f"trainer {rank} out": size for rank, size in sorted(volumes.sent.items())}
    for target, size in volumes.received.items():
        server, rank = divmod(target - layout.world_size, server_tp)
        cards[f"server {server} rank {rank} in"] = size
    sends = {rank: plan.sends(rank) for rank in range(layout.world_size)}
    shard = shard_bytes(architecture, layout, dtype)
    return SyncPlan(
        messages=sum(len(sent.messages) for sent in sends.values()),
        nbytes=plan.nbytes,
        sent=volumes.sent,
        received={},
        over_network=cards,
        held={rank: size + ITEMSIZE[dtype] * _beside(sends[rank], plan.held) for rank, size in shard.items()},
        shard=shard,
        seconds=_seconds(volumes, gpu),
    )


def direct_seconds(
    architecture: Architecture,
    layout: Layout,
    dtype: str,
    bucket_bytes: int,
    gpu: Gpu,
    *,
    servers: int,
    server_tp: int,
) -> float:
    """Return `plan_direct`'s seconds alone, which do not depend on how parts are put into messages."""
    return _seconds(_transfers(architecture, layout, dtype, bucket_bytes, servers, server_tp).volumes(), gpu)


def _transfers(
    architecture: Architecture, layout: Layout, dtype: str, bucket_bytes: int, servers: int, server_tp: int
) -> TransferPlan:
    needs = [_needs(architecture, server_tp)] * servers
    return TransferPlan(needs, _held(architecture, layout), layout, dtype, bucket_bytes)


@lru_cache(maxsize=2)
def _held(architecture: Architecture, layout: Layout) -> ShardTable:
    return shard_table(architecture, layout)


@lru_cache(maxsize=4)
def _needs(architecture: Architecture, server_tp: int) -> list[np.ndarray]:
    """Return the needs of each rank of a server; the planner asks for several layouts and numbers of servers."""
    shapes = hf_shapes(architecture)
    return [
        needs_table(rank, list(shapes))
        for rank in server_needs(shapes, server_tp, architecture.kv_groups, architecture.delta_net)
    ]


def _seconds(volumes: Volumes, gpu: Gpu) -> float:
    """Return the seconds of the busiest card and of the server's rank that has most parts to receive."""
    busiest = max(*volumes.sent.values(), *volumes.received.values())
    transfer_s = busiest / (gpu.nic_bytes_per_s * NIC_EFFICIENCY)
    return transfer_s + _REQUESTS * MESSAGE_S + max(volumes.parts.values()) * TENSOR_S


def _beside(sent: RankTransfers, held: ShardTable) -> int:
    """Return the most elements of two rounds that a sender copies: those of messages that are not contiguous."""
    if not len(sent.messages):
        return 0
    parts, counts = sent.messages["parts"], sent.counts()
    first = sent.parts[np.cumsum(parts) - parts]
    apart = (parts > 1) | ((first["rows"] > 1) & (first["columns"] < held.widths[first["of"]]))
    return 2 * int(np.bincount(sent.messages["round"], weights=np.where(apart, counts, 0)).max())
