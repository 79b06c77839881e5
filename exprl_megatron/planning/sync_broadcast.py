"""Plans a sync by `broadcast` or `handles` at any size: its messages, the links that they use, and its seconds.

It is computed from the sync's messages, without weights.
Ranks fill nodes in their order. Within a round every link works at the same time, each at the share of its rate that
NCCL reaches; rounds and messages follow one another as the transports have it: the next is gathered while servers take
the last, and servers take one at a time.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import hf_shapes, parameters
from exprl_megatron.models.shards import ITEMSIZE, holders, sender, shard_shape
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.links import NIC_EFFICIENCY, NVLINK_EFFICIENCY
from exprl_megatron.weight_sync.messages import Message, rounds, scratch_bytes, stage_messages

MESSAGE_S = 0.010
"""From a server's answer to a message until it takes the next: two HTTP hops and SGLang's queues between processes."""
TENSOR_S = 50e-6
"""A server's work for each tensor besides copying it: its name is looked up and its loader called."""

Flow = Counter[tuple[str, str]]
"""Bytes from one place to another. Places are `trainer R`, `server S` (all its ranks) on nodes."""


@dataclass(frozen=True)
class SyncPlan:
    """The predicted messages, bytes and seconds of one sync."""

    messages: int
    nbytes: int
    """Of all messages, once."""
    sent: dict[int, int]
    """Bytes that each trainer rank sends, those with none left out."""
    received: dict[int, int]
    """The same for receiving ranks: as the rank that fills messages."""
    over_network: dict[str, int]
    """Bytes through the network card of each trainer rank or server node that uses one, in and out counted apart."""
    held: dict[int, int]
    """The most bytes of weights that each trainer rank holds: its shard, two buckets where it fills them, and the shard
    on its way."""
    shard: dict[int, int]
    """Bytes of the rank's own part of the model."""
    seconds: float


def plan_sync(
    architecture: Architecture,
    layout: Layout,
    dtype: str,
    bucket_bytes: int,
    gpu: Gpu,
    *,
    servers: int,
    server_tp: int,
    colocated: bool,
    fp8: bool = False,
) -> SyncPlan:
    """Return the plan of a sync to `servers` servers of `server_tp` ranks.

    `colocated`: the trainer's nodes have equal shares of the servers, in contiguous blocks, and each server's rank
    takes handles from the trainer rank on its GPU; else servers have nodes of their own, at most one server's ranks on
    each, and take broadcasts.

    More than 7 parameters: they are the variables of the model of a sync.
    """
    staged = stage_messages(architecture, layout, dtype, bucket_bytes, fp8=fp8)
    chains = _chains(layout, gpu, servers, server_tp) if colocated else None
    order = [(m,) for messages in staged for m in messages] if colocated else rounds(staged)
    shapes = hf_shapes(architecture)
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    network: Counter[str] = Counter()
    gathering, taking = [], []
    for messages in order:
        flows: Counter[tuple[int, int]] = Counter()
        handed: Counter[tuple[int, int]] = Counter()
        for message in messages:
            for chain in chains or ((sender(message.stage, layout),),):
                flows.update(_gathered(message, chain[0], shapes, layout, dtype))
                handed.update({hop: message.nbytes for hop in pairwise(chain)})
        for (source, target), size in [*flows.items(), *handed.items()]:
            sent[source] += size
            received[target] += size
        network.update(_network(flows, gpu))
        gathering.append(_gather_seconds(flows, gpu) + _gather_seconds(handed, gpu))
        taking.append(0.0)
        for message in messages:
            if colocated:
                taking[-1] += _load_seconds(message, gpu)
            else:
                network.update(_broadcast(message, layout, servers))
                sent[sender(message.stage, layout)] += message.nbytes
                taking[-1] += _broadcast_seconds(message, gpu)
    source_ranks = {rank for chain in chains or () for rank in chain} or {sender(s, layout) for s in range(layout.pp)}
    shard = shard_bytes(architecture, layout, dtype)
    buckets = _bucket_bytes(staged, shapes, layout, dtype, fp8, source_ranks, chains is not None)
    return SyncPlan(
        messages=sum(map(len, order)),
        nbytes=sum(message.nbytes for messages in order for message in messages),
        sent=dict(sent),
        received=dict(received),
        over_network=dict(network),
        held={rank: size + buckets.get(rank, 0) for rank, size in shard.items()},
        shard=shard,
        seconds=_pipelined(gathering, taking),
    )


def _chains(layout: Layout, gpu: Gpu, servers: int, server_tp: int) -> list[list[int]]:
    """Return, by node, the trainer ranks that pass memory to servers' ranks; they pass messages on to each other."""
    nodes = -(-layout.world_size // gpu.gpus_per_node)
    apart = -(-server_tp // gpu.gpus_per_node) * gpu.gpus_per_node
    sharing = max(1, min(-(-servers // nodes), gpu.gpus_per_node // server_tp))
    ranks = set()
    for server in range(servers):
        first = server // sharing * apart + server % sharing * server_tp
        ranks |= {rank % layout.world_size for rank in range(first, first + server_tp)}
    chains: dict[int, list[int]] = {}
    for rank in sorted(ranks):
        chains.setdefault(rank // gpu.gpus_per_node, []).append(rank)
    return list(chains.values())


def _gathered(
    message: Message, filler: int, shapes: dict[str, tuple[int, ...]], layout: Layout, dtype: str
) -> Counter[tuple[int, int]]:
    """Return the bytes from rank to rank while a message is filled."""
    flows: Counter[tuple[int, int]] = Counter()
    for parameter in message.parameters:
        size = ITEMSIZE[dtype] * math.prod(shard_shape(parameter, shapes, layout))
        for rank in holders(parameter, layout):
            if rank != filler:
                flows[rank, filler] += size
    return flows


def _network(flows: Counter[tuple[int, int]], gpu: Gpu) -> Counter[str]:
    """Return the bytes of the flows between ranks that cross from node to node, by network card."""
    found: Counter[str] = Counter()
    for (source, target), size in flows.items():
        if source // gpu.gpus_per_node != target // gpu.gpus_per_node:
            found[f"trainer {source} out"] += size
            found[f"trainer {target} in"] += size
    return found


def _broadcast(message: Message, layout: Layout, servers: int) -> Counter[str]:
    """Return the bytes of NCCL's chain: out of the sender, into the first server's node, from there into the next."""
    found = Counter({f"trainer {sender(message.stage, layout)} out": message.nbytes})
    for server in range(servers):
        found[f"server {server} in"] += message.nbytes
        if server < servers - 1:
            found[f"server {server} out"] += message.nbytes
    return found


def _gather_seconds(flows: Counter[tuple[int, int]], gpu: Gpu) -> float:
    """Return the seconds of the busiest link."""
    nvlink: Counter[str] = Counter()
    for (source, target), size in flows.items():
        if source // gpu.gpus_per_node == target // gpu.gpus_per_node:
            nvlink[f"{source} out"] += size
            nvlink[f"{target} in"] += size
    cards = _network(flows, gpu)
    return max(
        _longest(nvlink, gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY),
        _longest(cards, gpu.nic_bytes_per_s * NIC_EFFICIENCY),
    )


def _longest(flows: Counter[str], rate: float) -> float:
    return max(flows.values(), default=0) / rate


def _broadcast_seconds(message: Message, gpu: Gpu) -> float:
    """Return the seconds to receive by one card and to copy the message into each server rank's memory."""
    slowest = min(gpu.nic_bytes_per_s * NIC_EFFICIENCY, gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY)
    return message.nbytes / slowest + _load_seconds(message, gpu)


def _load_seconds(message: Message, gpu: Gpu) -> float:
    return MESSAGE_S + TENSOR_S * len(message.slots) + 2 * message.nbytes / gpu.hbm_bytes_per_s


def _pipelined(gathering: list[float], taking: list[float]) -> float:
    """Return the seconds where round n + 1 is gathered while round n is taken."""
    between = sum(max(gather, take) for gather, take in zip(gathering[1:], taking[:-1], strict=True))
    return gathering[0] + between + taking[-1]


def shard_bytes(architecture: Architecture, layout: Layout, dtype: str) -> dict[int, int]:
    """Return the bytes of each rank's parameters; experts' as on their first copies."""
    shapes = hf_shapes(architecture)
    sizes: Counter[tuple[int, int | None]] = Counter()
    for parameter in parameters(architecture, layout):
        size = ITEMSIZE[dtype] * math.prod(shard_shape(parameter, shapes, layout))
        sizes[parameter.pp_rank, parameter.ep_rank] += size
    per_stage = layout.tp * layout.cp * layout.dp
    found = {}
    for rank in range(layout.world_size):
        stage, ep_rank = rank // per_stage, rank % per_stage // layout.etp % layout.ep
        found[rank] = sizes[stage, None] + sizes[stage, ep_rank]
    return found


def _bucket_bytes(
    staged: list[list[Message]],
    shapes: dict[str, tuple[int, ...]],
    layout: Layout,
    dtype: str,
    fp8: bool,
    source_ranks: Iterable[int],
    every: bool,
) -> dict[int, int]:
    """Return the bytes that ranks allocate to fill messages; with `every` they fill those of all stages."""
    found = {}
    for rank in source_ranks:
        mine = [m for messages in staged for m in messages if every or sender(m.stage, layout) == rank]
        beside = max(scratch_bytes(p, shapes, layout, dtype, fp8) for m in mine for p in m.parameters)
        found[rank] = 2 * max(message.nbytes for message in mine) + beside
    return found
