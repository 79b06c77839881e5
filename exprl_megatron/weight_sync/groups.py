"""Groups of trainer processes with all sampling servers, as SGLang's servers join them."""

import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from exprl_megatron.serving.process_groups import abort, begin_to_destroy, on_device, wait_destroyed
from exprl_megatron.utils.accelerator import group_backend
from exprl_megatron.utils.authentication import hidden_name
from exprl_megatron.utils.keyed_store import listening_store, reached_store
from exprl_megatron.weight_sync.coordinator import RankCoordinator, RankZeroFailed

_POLL_S = 0.001


def address_towards(host: str) -> str:
    """The address under which `host` reaches this machine. Raises OSError where there is no way to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting a datagram socket only chooses the interface.
        probe.connect((socket.gethostbyname(host), 9))
        return probe.getsockname()[0]


def is_here(host: str) -> bool:
    """Whether `host` is this machine."""
    return address_towards(host) == socket.gethostbyname(host)


def meeting_place(address: str, deadline_s: float, port: int = 0) -> dist.TCPStore:
    """Where the members of a group find each other: its `port` (0: any free one) of this machine's `address` alone.

    A process that still waits there gets an error when it is released; a group may need it as long as it exists.
    """
    return listening_store(address, port, deadline_s)


def group_name(secret: str) -> str:
    """A new name for a group, under which its members meet: only a holder of `secret` can compute it."""
    return f"exprl-weights-{hidden_name(secret, uuid.uuid4().hex)}"


def timeout_s(deadline_s: float) -> float:
    """Of a group, whose members give up after `deadline_s`."""
    # NCCL's watchdog ends the process where an operation takes longer: not before the group is broken off.
    return deadline_s if group_backend() == "gloo" else 3 * deadline_s


def meet(name: str, address: str, port: int, rank: int, world_size: int, deadline_s: float) -> dist.ProcessGroup:
    """The group `name` of `world_size` processes that find each other at the meeting place.

    Over gloo it is connected then, or RuntimeError is raised when `deadline_s` is over. Over NCCL its first operation
    connects it. SGLang's servers build their side with the same helper, so that the store's keys agree.
    """
    # A connection of its own: nobody else could use it while it waits.
    store = reached_store(address, port, deadline_s)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(group_backend()),
        PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=timeout_s(deadline_s)),
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def broadcast(group: dist.ProcessGroup, tensor: torch.Tensor) -> float:
    """Send `tensor` to all other members; the time when it was sent. To be called on the group's thread.

    Raises RuntimeError where a connection breaks, or the group is broken off.
    """
    with on_device(tensor.device):
        work = dist.broadcast(tensor, group=group, group_src=0, async_op=True)
        # On CUDA waiting only orders the streams.
        while not work.is_completed():
            time.sleep(_POLL_S)
        work.wait()
        return time.monotonic()


def follow_destroy(group: dist.ProcessGroup | None, coordinator: RankCoordinator, deadline_s: float) -> None:
    """Destroy an idle group on the other ranks, as rank 0 does; None: a rank without one.

    NCCL may wait for all members. Where rank 0 says that they do not come this rank does not wait for them.
    """
    destroying = None if group is None else begin_to_destroy(group)
    try:
        coordinator.wait_signal()
    except RankZeroFailed:
        if group is not None:
            abort(group)
        return
    if group is not None:
        wait_destroyed(group, destroying, deadline_s)


def break_off(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Abort a group in which operations may be in progress, as its rank `rank`.

    Over gloo the members that wait for this one get an error at once. NCCL reports nothing to them: they end when their
    own timeout is over, or when they learn it in another way and break off too.
    """
    if group_backend() == "gloo":
        _close_connections(group, rank, world_size)
    abort(group)


def _close_connections(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Gloo closes a group's connections when somebody has waited in vain for one of them."""
    for peer in range(world_size):
        if peer != rank:
            with suppress(RuntimeError):
                dist.irecv(torch.zeros(1), group=group, group_src=peer).wait(timedelta(milliseconds=1))
