"""Process groups of trainer ranks and all sampling servers, compatible with SGLang's servers."""

import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from exprl_megatron.serving.process_groups import abort, on_device, start_destroy, wait_destroyed
from exprl_megatron.utils.accelerator import group_backend
from exprl_megatron.utils.authentication import hidden_name
from exprl_megatron.utils.keyed_store import connect_store, start_store
from exprl_megatron.utils.required import required
from exprl_megatron.weight_sync.coordinator import RankCoordinator, RankZeroFailed

_POLL_S = 0.001


def address_towards(host: str) -> str:
    """Return the address at which `host` reaches this machine. Raises OSError where there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting a datagram socket only selects the interface.
        probe.connect((socket.gethostbyname(host), 9))
        return probe.getsockname()[0]


def host_of(url: str) -> str:
    """Return the host in a server's URL.

    Raises:
        RuntimeError: it has none.
    """
    return required(urlsplit(url).hostname, f"a host in {url}")


def is_local_host(host: str) -> bool:
    """Return whether `host` is this machine."""
    return address_towards(host) == socket.gethostbyname(host)


def rendezvous_store(address: str, deadline_s: float, port: int = 0) -> dist.TCPStore:
    """Create the store in which a group's members meet, at `port` (0: any free one) of this machine's `address`.

    A process that waits in it gets an error when it is released; a group may need it for as long as it exists.
    """
    return start_store(address, port, deadline_s)


def group_name(secret: str) -> str:
    """Return a new name for a group, which only holders of `secret` can compute."""
    return f"exprl-weights-{hidden_name(secret, uuid.uuid4().hex)}"


def timeout_s(deadline_s: float) -> float:
    """Return the timeout of a group whose members wait for at most `deadline_s`."""
    # NCCL's watchdog ends the process where an operation takes longer: so only after the group was aborted.
    return deadline_s if group_backend() == "gloo" else 3 * deadline_s


def init_group(name: str, address: str, port: int, rank: int, world_size: int, deadline_s: float) -> dist.ProcessGroup:
    """Create the group `name` of `world_size` processes, which meet in the store at `address` and `port`.

    Over gloo it is connected when this returns; RuntimeError is raised after `deadline_s`. Over NCCL its first
    operation connects it. SGLang's servers use the same helper, so that the keys in the store agree.
    """
    # A separate connection, since a waiting call blocks other calls on the same connection.
    store = connect_store(address, port, deadline_s)
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
    """Broadcast `tensor`, of any shape and dtype, to all other members; must be called on the group's thread.

    Returns the time (time.monotonic, seconds) when it was sent.

    Raises:
        RuntimeError: a connection breaks, or the group is aborted.
    """
    with on_device(tensor.device):
        work = required(dist.broadcast(tensor, group=group, group_src=0, async_op=True), "an asynchronous broadcast")
        # On CUDA, `wait` only orders the streams.
        while not work.is_completed():
            time.sleep(_POLL_S)
        work.wait()
        return time.monotonic()


def follow_destroy(group: dist.ProcessGroup | None, coordinator: RankCoordinator, deadline_s: float) -> None:
    """Destroy an idle group on the other ranks while rank 0 does; None: a rank without one.

    NCCL may wait for all members. Where rank 0 aborts, this rank does not wait for them.
    """
    destroying = None if group is None else start_destroy(group)
    try:
        coordinator.wait_signal()
    except RankZeroFailed:
        if group is not None:
            abort(group)
        return
    if group is not None and destroying is not None:
        wait_destroyed(group, destroying, deadline_s)


def abort_group(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Abort a group with operations in flight, as its rank `rank`.

    Over gloo the members that wait for this one get an error immediately. NCCL does not notify them: they end after
    their own timeout, or when they are informed in another way and abort too.
    """
    if group_backend() == "gloo":
        _close_connections(group, rank, world_size)
    abort(group)


def _close_connections(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Make gloo close all connections of a group, which it does when a wait for one of them times out."""
    for peer in range(world_size):
        if peer != rank:
            with suppress(RuntimeError):
                receiving = required(dist.irecv(torch.zeros(1), group=group, group_src=peer), "a receive")
                receiving.wait(timedelta(milliseconds=1))
