"""torchrun's part for tests: `python -m helpers.fork_ranks PROCESSES SCRIPT OUT` forks every rank of one process.

That process has their libraries and is itself forked (see forking).
"""

import ctypes
import os
import runpy
import signal
import sys
import traceback
import warnings

import torch.distributed as dist

import exprl_megatron.policy.policy  # noqa: F401 - loaded before the ranks are forked
from exprl_megatron.utils.ports import LOCAL, free_ports

_PR_SET_PDEATHSIG = 1


def main(processes: int, script: str, out: str) -> int:
    """Exit status 1 as soon as one rank fails; the others are ended then."""
    warnings.simplefilter("ignore")
    (port,) = free_ports(1)
    os.environ |= {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    children = [fork(rank, script, out) for rank in range(processes)]
    # Started here, and not before, as no thread is forked with them.
    store = dist.TCPStore(LOCAL, port, is_master=True, wait_for_workers=False)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    del store
    return 0


def fork(rank: int, script: str, out: str) -> int:
    """Start one rank; its process id."""
    if child := os.fork():
        return child
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [script, out]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
