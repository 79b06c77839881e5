"""Several trainer processes, and several worlds one after the other in the same processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.world import World, enter_world, leave_world
from exprl_megatron.utils.accelerator import group_backend
from helpers.forking import RANKS, starter


def run_ranks(
    script: Path,
    processes: int,
    out: Path,
    timeout_s: float = 600.0,
    torchrun: bool = False,
    environment: Mapping[str, str] | None = None,
    **arguments,
) -> dict:
    """Runs `script` in so many processes; what its rank 0 left in `out`. Fails with the processes' last words.

    `torchrun` starts them instead of a fork, which CUDA does not survive. `environment` is added to ours.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "arguments.json").write_text(json.dumps(arguments, default=str))
    torchrun_module = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
    program = [*(torchrun_module if torchrun else [RANKS]), str(processes), str(script), str(out)]
    variables = os.environ | (environment or {}) | {"OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parents[1]), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with open(out / "log", "w") as log:
        process = starter().start("ranks", [sys.executable, "-m", *program], variables, log, log)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            status = process.wait()
    assert status == 0, f"{script.name} ended with {status}:\n" + (out / "log").read_text()[-6000:]
    return json.loads((out / "results.json").read_text())


class Ranks:
    """One of the processes that run_ranks started."""

    def __init__(self):
        self.out = Path(sys.argv[1])
        self.arguments = json.loads((self.out / "arguments.json").read_text())
        self.rank = int(os.environ["RANK"])
        self.results: dict = {}
        self._store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self._worlds = 0

    def within(self, layout: Layout, work: Callable[[World], object], name: str | None = None) -> None:
        """Runs `work` in a world of `layout` made of the first processes; keeps rank 0's answer as `name`."""
        if self.join(layout.world_size):
            result = work(enter_world(layout, timeout_s=120.0))
            if name is not None:
                self.results[name] = result
            leave_world()

    def join(self, processes: int) -> bool:
        """Return a process group of the first `processes`; whether this one is among them."""
        self._worlds += 1
        if self.rank >= processes:
            return False
        store = dist.PrefixStore(f"world-{self._worlds}", self._store)
        dist.init_process_group(group_backend(), store=store, rank=self.rank, world_size=processes)
        return True

    def finish(self) -> None:
        """Leaves the results for run_ranks."""
        if self.rank == 0:
            (self.out / "results.json").write_text(json.dumps(self.results))
