"""Rank 0 has every sequence of a step; every other rank gets those that it learns from, and outlines of the rest.

Of each data-parallel rank one process gets the message of rank 0, and passes it on to those that share the rank with
it: rank 0 sends every sequence once, however many processes there are. Objects travel over gloo.
"""

from collections.abc import Sequence as ListLike

import torch.distributed as dist

from exprl_megatron.algorithms.batch import LearnedFrom
from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.host_group import host_group
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.sealed_objects import broadcast_object, receive_object, send_object

Batch = list[LearnedFrom]


class SequenceScatter:
    """Made and called by every rank at the same time; exists once for a policy's world."""

    def __init__(self, policy: Policy):
        self._policy = policy
        layout, rank = policy.world.layout, dist.get_rank()
        members = [[r for r in range(layout.world_size) if dp_rank_of(layout, r) == dp] for dp in range(layout.dp)]
        self._leaders = [ranks[0] for ranks in members]
        # Every rank takes part in making every group.
        groups = [dist.new_group(ranks, backend="gloo") for ranks in members]
        self._own = dp_rank_of(layout, rank)
        self._group = groups[self._own]

    def scatter(self, batches: ListLike[Batch] | None) -> list[Batch]:
        """Rank 0's `batches` (None elsewhere) with the sequences that this rank learns from whole; all on rank 0.

        Which these are is what the policy plans for each batch. What is the same object in several batches is sent
        once.
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
    """The data-parallel rank of trainer process `rank`, by Megatron's order of dimensions (tp, cp, dp, pp)."""
    return rank // (layout.tp * layout.cp) % layout.dp


def _of(dp_rank: int, batches: ListLike[Batch], owners: ListLike[list[int]]) -> list[Batch]:
    return [
        [one if owner == dp_rank else one.outline for one, owner in zip(batch, own, strict=True)]
        for batch, own in zip(batches, owners, strict=True)
    ]
