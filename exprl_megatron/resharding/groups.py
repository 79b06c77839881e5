"""Broadcast groups of one trainer process with all sampling servers, as SGLang's servers join them."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,
    _world,
    rendezvous,
)


def backend() -> str:
    """Gloo between CPU processes, NCCL between GPUs."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def address_towards(host: str) -> str:
    """The address under which `host` reaches this machine. Raises OSError where there is no way to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting a datagram socket only chooses the interface.
        probe.connect((socket.gethostbyname(host), 9))
        return probe.getsockname()[0]


def is_here(host: str) -> bool:
    """Whether `host` is this machine."""
    return address_towards(host) == socket.gethostbyname(host)


def in_background[T](name: str, work: Callable[[], T]) -> Future[T]:
    """Begin `work` on a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # whoever waits for the future raises it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def join(name: str, address: str, port: int, rank: int, world_size: int, deadline_s: float) -> dist.ProcessGroup:
    """The group `name` of `world_size` processes, once all have come; rank 0 listens at `address` and `port`.

    Gives up after `deadline_s`.
    """
    timeout = timedelta(seconds=deadline_s)
    store, _, _ = next(rendezvous(f"tcp://{address}:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return form(name, store, rank, world_size, deadline_s)


def form(name: str, store: dist.Store, rank: int, world_size: int, deadline_s: float) -> dist.ProcessGroup:
    """The group `name` of `world_size` processes that meet in `store`.

    SGLang's servers build their side with the same helper, so that the store's keys agree.
    """
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend()),
        PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=deadline_s),
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def break_off(group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Cut this rank, number `rank`, off from the group's others: whoever waits for it there gets an error at once."""
    if backend() == "nccl":
        group.abort()
        return
    for peer in range(world_size):
        if peer != rank:
            try:
                # Gloo closes all connections of a group when somebody has waited in vain for one; its abort does not.
                dist.irecv(torch.zeros(1), group=group, group_src=peer).wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue
