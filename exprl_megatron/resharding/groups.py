"""Groups of trainer processes with all sampling servers, as SGLang's servers join them."""

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
)

from exprl_megatron.accelerator import uses_cuda


def backend() -> str:
    """Gloo between CPU processes, NCCL between GPUs."""
    return "nccl" if uses_cuda() else "gloo"


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


def meeting_place(address: str, deadline_s: float, port: int = 0) -> dist.TCPStore:
    """Where the members of a group find each other: its `port` (0: any free one) of this machine's `address`.

    Whoever still waits there gets an error when it is let go of; a group may need it as long as it lives.
    """
    timeout = timedelta(seconds=deadline_s)
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout)


def meet(name: str, address: str, port: int, rank: int, world_size: int, deadline_s: float) -> dist.ProcessGroup:
    """The group `name` of `world_size` processes, once all have come to the meeting place or `deadline_s` is over.

    SGLang's servers build their side with the same helper, so that the store's keys agree.
    """
    timeout = timedelta(seconds=deadline_s)
    # A connection of its own: nobody else could use it while it waits.
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend()),
        PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
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
