"""Broadcast groups of one trainer process with all sampling servers, as SGLang's servers join them."""

import socket
import threading
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


def join_in_background(
    name: str, address: str, port: int, world_size: int, deadline_s: float
) -> Future[dist.ProcessGroup]:
    """Begin to form the group `name` as its rank 0; done when all servers have joined.

    The thread that waits for them gives up after `deadline_s` and does not keep the process from ending.
    """
    future: Future[dist.ProcessGroup] = Future()

    def work() -> None:
        try:
            future.set_result(join(name, address, port, 0, world_size, deadline_s))
        except Exception as error:  # whoever waits for the group raises it
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def join(name: str, address: str, port: int, rank: int, world_size: int, deadline_s: float) -> dist.ProcessGroup:
    """The group `name` of `world_size` processes, once all have come; rank 0 listens at `address` and `port`.

    SGLang's servers build their side with the same helper, so that the store's keys agree.
    """
    timeout = timedelta(seconds=deadline_s)
    store, _, _ = next(rendezvous(f"tcp://{address}:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
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
