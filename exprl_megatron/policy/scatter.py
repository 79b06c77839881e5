"""Scatter of training samples: rank 0 has all of a step, every other rank gets its own and outlines of the rest.

One process of each data-parallel rank receives rank 0's message and broadcasts it to the processes that share the rank
with it: rank 0 sends every sample once, however many processes there are. Objects travel over gloo.
"""

from collections.abc import Sequence

import torch.distributed as dist

from exprl_megatron.algorithms.batch import SampleOrOutline
from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.host_group import host_group
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.sealed_objects import broadcast_object, receive_object, send_object

SampleBatch = list[SampleOrOutline]


class SampleScatter:
    """Scatters samples over the ranks of a policy; every rank constructs and calls it at the same time."""

    def __init__(self, policy: Policy):
        self._policy = policy
        layout, rank = policy.world.layout, dist.get_rank()
        members = [[r for r in range(layout.world_size) if dp_rank_of(layout, r) == dp] for dp in range(layout.dp)]
        self._leaders = [ranks[0] for ranks in members]
        # Every rank takes part in making every group.
        groups = [dist.new_group(ranks, backend="gloo") for ranks in members]
        self._own = dp_rank_of(layout, rank)
        self._group = groups[self._own]

    def scatter(self, batches: Sequence[SampleBatch] | None) -> list[SampleBatch]:
        """Send rank 0's `batches` (None elsewhere) to all ranks; returns this rank's samples and outlines of others.

        The policy's plan for each batch decides which samples a rank gets; rank 0 keeps all. An object in several
        batches is sent once.
        """
        if dist.get_rank() == 0:
            owners = [self._policy.owners(batch) for batch in batches]
            for dp_rank, leader in enumerate(self._leaders[1:], 1):
                send_object(_of(dp_rank, batches, owners), leader, host_group())
        message = None
        if self._leaders[self._own] == dist.get_rank():
            message = _of(0, batches, owners) if dist.get_rank() == 0 else receive_object(0, host_group())
        if dist.get_world_size(self._group) > 1:
            message = broadcast_object(message, self._leaders[self._own], self._group)
        return list(batches) if dist.get_rank() == 0 else message


def dp_rank_of(layout: Layout, rank: int) -> int:
    """Return the data-parallel rank of process `rank`, in Megatron's order of dimensions (tp, cp, dp, pp)."""
    return rank // (layout.tp * layout.cp) % layout.dp


def _of(dp_rank: int, batches: Sequence[SampleBatch], owners: Sequence[list[int]]) -> list[SampleBatch]:
    return [
        [one if owner == dp_rank else one.outline for one, owner in zip(batch, own, strict=True)]
        for batch, own in zip(batches, owners, strict=True)
    ]
