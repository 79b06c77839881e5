"""The gloo group in which all trainer ranks exchange objects; tensors never go through it.

Over NCCL every object would be copied to the device and back, and a rank that waits for one would keep a kernel
spinning on a device on which a server works.
"""

from datetime import timedelta

import torch.distributed as dist

from exprl_megatron.policy.signed_objects import all_gather_objects, broadcast_object

_made: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
"""The default group, and the host group of the same ranks."""


def gloo_group(timeout_s: float = 600.0) -> dist.ProcessGroup:
    """Return the group of all ranks. The first call for a default group, which makes it, is a collective.

    A rank that waits in it longer than `timeout_s` of that call raises RuntimeError.
    """
    global _made
    everyone = dist.group.WORLD
    if _made is None or _made[0] is not everyone:
        _made = everyone, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return _made[1]


def broadcast_from_rank[T](source: int, item: T) -> T:
    """Return the `item` of rank `source` on every rank; a collective."""
    return broadcast_object(item, source, gloo_group())


def gather_from_all_ranks[T](item: T) -> list[T]:
    """Return every rank's `item`, in the order of ranks, on every rank; a collective."""
    return all_gather_objects(item, gloo_group())
