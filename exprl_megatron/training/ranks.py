"""The trainer's processes on this machine: started, watched, stopped, and asked how they ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from exprl_megatron.accelerator import environment, settle, uses_cuda
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.cuda_environment import rank_variables
from exprl_megatron.errors import RunStopped
from exprl_megatron.serving.log_tail import log_tail
from exprl_megatron.serving.ports import LOCAL, free_ports
from exprl_megatron.serving.supervise import supervised
from exprl_megatron.training.directory import RunDirectory
from exprl_megatron.training.nodes import Node, ended

_STOP_S = 10.0
_LAST_WORDS_S = 3.0


class TrainerRanks:
    """The workers of one run that are `node`'s, with torchrun's environment; rank 0 shares our standard output."""

    def __init__(self, directory: RunDirectory, config: RunConfig, servers: Path, node: Node | None = None):
        self._logs = directory.logs
        self._world_size = config.policy.layout.world_size
        node = node or Node()
        ranks = node.ranks(self._world_size)
        meeting = _meeting(node)
        settle()
        self._processes: dict[int, subprocess.Popen] = {}
        for rank in ranks:
            log = open(self._log(rank), "ab")  # noqa: SIM115 - the child keeps it
            worker = [sys.executable, "-m", "exprl_megatron.training.worker", str(directory.root)]
            # What a rank starts (checkpoint writers, verifiers) must end with it, even by kill -9.
            command = supervised([*worker, "--servers", str(servers)])
            place = {"RANK": rank, "LOCAL_RANK": rank - ranks.start, "WORLD_SIZE": self._world_size}
            self._processes[rank] = subprocess.Popen(
                command,
                env=rank_environment(os.environ, config.server)
                | {name: str(number) for name, number in place.items()}
                | meeting,
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=log,
            )
            log.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks' supervisors."""
        return [process.pid for process in self._processes.values()]

    def running(self) -> bool:
        """Whether all ranks still run; False when all ended well. Raises what ended the first that failed."""
        states = {rank: process.poll() for rank, process in self._processes.items()}
        failed = [rank for rank, state in states.items() if state not in (None, 0)]
        if failed:
            self._await_last_words()
            raise self._cause(failed)
        return None in states.values()

    def alive(self) -> bool:
        """Whether any rank still runs."""
        return any(process.poll() is None for process in self._processes.values())

    def stop(self) -> None:
        """End all ranks: politely, then not."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _await_last_words(self) -> None:
        """A rank that only follows may end before the one that knows the reason."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline and self.alive():
            time.sleep(0.05)

    def _cause(self, failed: list[int]) -> Exception:
        """What the first rank that knows says; ranks that only follow another's failure say nothing."""
        for rank in range(self._world_size):
            end = self._logs / f"trainer-{rank}.end"
            if end.is_file():
                return ended(json.loads(end.read_text()))
        rank = failed[0]
        status = self._processes[rank].returncode
        how = f"was killed by signal {status - 128}" if status > 128 else f"ended with status {status}"
        return RunStopped(f"trainer-{rank} {how}; go on with --resume.{log_tail(self._log(rank))}")

    def _log(self, rank: int) -> Path:
        return self._logs / f"trainer-{rank}.log"


def _meeting(node: Node) -> dict[str, str]:
    """Where ranks find each other: at the store of node 0's launcher, or at rank 0 where they are all here."""
    if node.port is None:
        return {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(free_ports(1)[0])}
    return {"MASTER_ADDR": node.host, "MASTER_PORT": str(node.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def rank_environment(inherited: Mapping[str, str], server: ServerConfig) -> dict[str, str]:
    """The environment of a rank that sends weights to such servers, without its place among the ranks."""
    # Several ranks share the cores: one thread each, unless the user says otherwise.
    found = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(inherited)
    return found | rank_variables(inherited, server.extra_args, server.tp) | environment(uses_cuda())
