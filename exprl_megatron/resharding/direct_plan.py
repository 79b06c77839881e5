"""What a sync by `direct` would send at any size, over which links, and how long: computed from its deliveries.

Every rank of trainer and servers has a network card; all links work at once, each at the share of its rate that NCCL
reaches.
"""

import numpy as np

from exprl_megatron.config.policy import Layout
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.links import NIC_SHARE
from exprl_megatron.policy.architecture import Architecture
from exprl_megatron.resharding.deliveries import DeliveryPlan
from exprl_megatron.resharding.held import Held, held_shares
from exprl_megatron.resharding.messages import ITEMSIZE
from exprl_megatron.resharding.names import hf_shapes
from exprl_megatron.resharding.plan import MESSAGE_S, TENSOR_S, SyncPlan, shard_bytes
from exprl_megatron.serving.delivery_tables import Deliveries, areas, needs_table
from exprl_megatron.serving.sharding import server_needs

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
    """The plan of a sync to `servers` servers of `server_tp` ranks on nodes of their own."""
    held = held_shares(architecture, layout)
    ranks = server_needs(hf_shapes(architecture), server_tp, architecture.kv_groups)
    needs = [[needs_table(rank, held.tensors) for rank in ranks]] * servers
    plan = DeliveryPlan(needs, held, layout, dtype, bucket_bytes)
    itemsize = ITEMSIZE[dtype]
    sends = {rank: plan.sends(rank) for rank in range(layout.world_size)}
    out = {rank: itemsize * int(areas(sent.parts).sum()) for rank, sent in sends.items() if len(sent.parts)}
    cards = {f"trainer {rank} out": size for rank, size in out.items()}
    taking = []
    for target in plan.targets:
        server, rank = divmod(target - layout.world_size, server_tp)
        received = plan.receives(target)
        cards[f"server {server} rank {rank} in"] = itemsize * int(areas(received.parts).sum())
        taking.append(len(received.parts))
    shard = {rank: shard_bytes(architecture, layout, rank, dtype) for rank in range(layout.world_size)}
    transfer_s = max(cards.values()) / (gpu.nic_bytes_per_s * NIC_SHARE)
    return SyncPlan(
        messages=sum(len(sent.messages) for sent in sends.values()),
        nbytes=plan.nbytes,
        sent=out,
        received={},
        over_network=cards,
        held={rank: size + itemsize * _beside(sends[rank], held) for rank, size in shard.items()},
        shard=shard,
        seconds=transfer_s + _REQUESTS * MESSAGE_S + max(taking) * TENSOR_S,
    )


def _beside(sent: Deliveries, held: Held) -> int:
    """Numbers of the two rounds that a sender may have to put together beside its shard."""
    if not len(sent.messages):
        return 0
    parts, counts = sent.messages["parts"], sent.counts()
    first = sent.parts[np.cumsum(parts) - parts]
    apart = (parts > 1) | ((first["rows"] > 1) & (first["columns"] < held.widths[first["of"]]))
    return 2 * int(np.bincount(sent.messages["round"], weights=np.where(apart, counts, 0)).max())
