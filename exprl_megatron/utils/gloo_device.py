"""One gloo device for all groups of a process on a CPU.

A device has a thread that wakes 100 times a second, and torch makes a device for every group, of which a trainer rank
and a server have a dozen each.
"""

import os
from datetime import timedelta
from functools import lru_cache

from torch.distributed.distributed_c10d import Backend, ProcessGroup, ProcessGroupGloo

_INTERFACES = "GLOO_SOCKET_IFNAME"


def share_gloo_device() -> None:
    """Make all new gloo groups of this process share its devices. Calling it again changes nothing."""
    Backend.register_backend(
        Backend.GLOO,
        _group,
        extended_api=True,
        devices=Backend.backend_capability[Backend.GLOO],
        _backend_type=ProcessGroup.BackendType.GLOO,
    )


def _group(settings, _: object) -> ProcessGroupGloo:
    """Make what torch's own _create_gloo_process_group makes, with the shared devices."""
    timeout: timedelta = settings.timeout
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = _devices(os.getpid(), os.environ.get(_INTERFACES, ""))
    options._threads = 2 * len(options._devices)
    options._timeout = timeout
    options.enable_reconfigure = settings.enable_reconfigure
    options.global_ranks_in_group = settings.global_ranks_in_group
    options.group_name = settings.group_id
    return ProcessGroupGloo(settings.store, settings.group_rank, settings.group_size, options)


@lru_cache
def _devices(process: int, interfaces: str) -> list:
    """Return this process's devices: a forked process cannot use its parent's, whose threads it does not have."""
    if not interfaces:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
