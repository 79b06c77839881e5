"""All gloo groups of a process on a CPU share one device, and are otherwise as torch makes them."""

import subprocess
import sys

IN_A_NEW_PROCESS = r"""
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from exprl_megatron.utils.gloo_device import share_gloo_device


def loops():
    return sum("gloo_tcp" in (thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir())


def meet(rank, store):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    groups = [dist.new_group(backend="gloo", timeout=timedelta(seconds=7)) for _ in range(5)]
    total = torch.ones(3)
    for group in groups:
        dist.all_reduce(total, group=group)
    dist.destroy_process_group(groups[0])
    dist.all_reduce(total, group=groups[1])
    options = groups[1]._get_backend(torch.device("cpu")).options
    found = rank, loops(), int(total[0]), options._timeout.seconds, options.global_ranks_in_group
    os.write(1, (" ".join(map(str, found)) + "\n").encode())
    dist.barrier()


def forked(rank, store):
    child = os.fork()
    if child == 0:
        meet(rank, store)
        os._exit(0)
    return child


share_gloo_device()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.destroy_process_group()
for child in [forked(rank, "STORE") for rank in range(2)]:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_groups_share_a_device_that_a_forked_process_makes_for_itself(tmp_path):
    program = IN_A_NEW_PROCESS.replace("STORE", str(tmp_path / "store"))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert sorted(found.stdout.splitlines()) == ["0 1 64 7 [0, 1]", "1 1 64 7 [0, 1]"]
