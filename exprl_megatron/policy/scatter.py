"""Scatter of training samples: rank 0 has all of a step, every other rank gets its own and outlines of the rest.

One process of each data-parallel rank receives rank 0's message and broadcasts it to the processes that share the rank
with it: rank 0 sends every sample once, however many processes there are. The experts of a mixture's samples, most of
their bytes, go by pipeline stages: one process of each stage of a data-parallel rank receives those of the stage's
layers alone, and broadcasts them to the processes that share the stage with it. Objects travel over gloo.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist

from exprl_megatron.algorithms.batch import SampleOrOutline, TrainSample
from exprl_megatron.config.policy import Layout
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy.gloo_group import gloo_group
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.routed_rows import stage_experts
from exprl_megatron.policy.signed_objects import broadcast_object, receive_object, send_object

SampleBatch = list[SampleOrOutline]


class SampleScatter:
    """Scatters samples over the ranks of a policy; every rank constructs and calls it at the same time."""

    def __init__(self, policy: Policy):
        self._policy = policy
        layout = policy.world.layout
        ranks = range(layout.world_size)
        self._shares = _Receivers([dp_rank_of(layout, rank) for rank in ranks])
        routing = Routing.of(policy.architecture)
        self._layers = [] if routing is None else routing.layers_of_stages(policy.architecture, layout)
        self._stages = _Receivers([stage_of(layout, rank) for rank in ranks]) if self._layers else None

    def scatter(self, batches: Sequence[SampleBatch] | None) -> list[SampleBatch]:
        """Send rank 0's `batches` (None elsewhere) to all ranks; returns this rank's samples and outlines of others.

        The policy's plan for each batch decides which samples a rank gets, and of their experts the layers of its
        pipeline stage; rank 0 keeps all. An object in several batches is sent once.
        """
        given = [] if batches is None else batches
        owners = [self._policy.owners(batch) for batch in given]
        routed = any(sample.has_routed_experts for batch in given for sample in batch)
        share, routed = self._shares.deliver(lambda dp_rank: (_without_experts(_of(dp_rank, given, owners)), routed))
        if routed and self._stages is not None:
            dp = self._policy.world.layout.dp
            experts = self._stages.deliver(
                lambda stage: experts_of(_of(stage % dp, given, owners), self._layers[stage // dp])
            )
            share = _with_experts(share, experts, self._layers[self._policy.world.pp_rank])
        return list(given) if dist.get_rank() == 0 else share


class _Receivers:
    """Groups of ranks that get the same message: one of each receives it from rank 0 and broadcasts it to the rest."""

    def __init__(self, groups: Sequence[int]):
        """`groups`: the number of each rank's group; rank 0 is in number 0. A collective of all ranks."""
        members = [[rank for rank, own in enumerate(groups) if own == number] for number in range(max(groups) + 1)]
        # Every rank takes part in making every group.
        made = [dist.new_group(ranks, backend="gloo") for ranks in members]
        self._leaders = [ranks[0] for ranks in members]
        self._own = groups[dist.get_rank()]
        self._group = made[self._own]

    def deliver[T](self, message_of: Callable[[int], T]) -> T:
        """Return what `message_of`, which rank 0 alone calls, has for this rank's group; a collective."""
        here, leader = dist.get_rank(), self._leaders[self._own]
        message: Any = None
        if here == 0:
            for number, other in enumerate(self._leaders[1:], 1):
                send_object(message_of(number), other, gloo_group())
        if here == leader:
            message = message_of(0) if here == 0 else receive_object(0, gloo_group())
        if dist.get_world_size(self._group) > 1:
            message = broadcast_object(message, leader, self._group)
        return message


def dp_rank_of(layout: Layout, rank: int) -> int:
    """Return the data-parallel rank of process `rank`, in Megatron's order of dimensions (tp, cp, dp, pp)."""
    return stage_of(layout, rank) % layout.dp


def stage_of(layout: Layout, rank: int) -> int:
    """Return pipeline rank x dp + data-parallel rank of process `rank`: the same where tp or cp differ."""
    return rank // (layout.tp * layout.cp)


def experts_of(share: Sequence[SampleBatch], layers: Sequence[int]) -> list[np.ndarray | None]:
    """Return the experts for `layers` of each complete sample of `share`, [tokens - 1, layers, top_k], each sample
    once; None: it has none.
    """
    return [stage_experts(sample, layers) for sample in _complete(share)]


def _of(dp_rank: int, batches: Sequence[SampleBatch], owners: Sequence[list[int]]) -> list[SampleBatch]:
    return [
        [one if owner == dp_rank else one.outline for one, owner in zip(batch, own, strict=True)]
        for batch, own in zip(batches, owners, strict=True)
    ]


def _complete(share: Sequence[SampleBatch]) -> Iterator[TrainSample]:
    """Yield each complete sample once, in the order of first appearance."""
    return iter({id(one): one for batch in share for one in batch if isinstance(one, TrainSample)}.values())


def _without_experts(share: Sequence[SampleBatch]) -> list[SampleBatch]:
    return _exchanged(share, {id(one): replace(one, routed_experts=None) for one in _complete(share)})


def _with_experts(
    share: Sequence[SampleBatch], experts: Sequence[np.ndarray | None], layers: tuple[int, ...]
) -> list[SampleBatch]:
    pairs = zip(_complete(share), experts, strict=True)
    return _exchanged(
        share, {id(one): replace(one, routed_experts=e, routed_layers=layers) for one, e in pairs if e is not None}
    )


def _exchanged(share: Sequence[SampleBatch], by_id: dict[int, TrainSample]) -> list[SampleBatch]:
    return [[by_id.get(id(one), one) for one in batch] for batch in share]
