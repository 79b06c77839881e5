"""What a sync by `direct` would send at any size, over which links, and how long: computed from its deliveries.

Every rank of trainer and servers has a network card; all links work at once, each at the share of its rate that NCCL
reaches.
"""

from collections import Counter, defaultdict

from exprl_megatron.config.policy import Layout
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.links import NIC_SHARE
from exprl_megatron.policy.architecture import Architecture
from exprl_megatron.resharding.deliveries import Sent, plan_deliveries, shares
from exprl_megatron.resharding.messages import ITEMSIZE, shard_shape
from exprl_megatron.resharding.names import hf_shapes
from exprl_megatron.resharding.plan import MESSAGE_S, TENSOR_S, SyncPlan, shard_bytes
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
    shapes = hf_shapes(architecture)
    needs = [server_needs(shapes, server_tp, architecture.kv_groups)] * servers
    deliveries = plan_deliveries(needs, shares(architecture, layout), layout, dtype, bucket_bytes)
    itemsize = ITEMSIZE[dtype]
    out: Counter[int] = Counter()
    cards: Counter[str] = Counter()
    taking: Counter[int] = Counter()
    for one in deliveries:
        size = one.delivery.count * itemsize
        server, rank = divmod(one.delivery.target - layout.world_size, server_tp)
        out[one.delivery.source] += size
        cards[f"trainer {one.delivery.source} out"] += size
        cards[f"server {server} rank {rank} in"] += size
        taking[one.delivery.target] += len(one.delivery.parts)
    shard = {rank: shard_bytes(architecture, layout, rank, dtype) for rank in range(layout.world_size)}
    beside = _beside(deliveries, shapes, layout, itemsize)
    transfer_s = max(cards.values()) / (gpu.nic_bytes_per_s * NIC_SHARE)
    return SyncPlan(
        messages=len(deliveries),
        nbytes=sum(out.values()),
        sent=dict(out),
        received={},
        over_network=dict(cards),
        held={rank: size + beside[rank] for rank, size in shard.items()},
        shard=shard,
        seconds=transfer_s + _REQUESTS * MESSAGE_S + max(taking.values()) * TENSOR_S,
    )


def _beside(deliveries: list[Sent], shapes: dict[str, tuple[int, ...]], layout: Layout, itemsize: int) -> Counter[int]:
    """Bytes of the two rounds that each sender may have to put together beside its shard."""
    rounds: dict[int, Counter[int]] = defaultdict(Counter)
    for one in deliveries:
        (parameter, _, _), *others = one.sources
        width = (*shard_shape(parameter, shapes, layout), 1)[1]
        part = one.delivery.parts[0]
        if others or (part.rows > 1 and part.columns < width):
            rounds[one.delivery.source][one.delivery.round] += one.delivery.count * itemsize
    return Counter({source: 2 * max(by_round.values()) for source, by_round in rounds.items()})
