"""The trainer's processes on this machine: started, watched, stopped, and asked how they ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from exprl_megatron.errors import Preempted, RunStopped, UserError
from exprl_megatron.serving import supervise
from exprl_megatron.serving.log_tail import log_tail
from exprl_megatron.serving.ports import free_ports
from exprl_megatron.training.directory import RunDirectory

_ENDS = {2: UserError, os.EX_TEMPFAIL: Preempted}
"""Of the statuses that a rank tells; any other is RunStopped."""
_STOP_S = 10.0
_LAST_WORDS_S = 3.0


class TrainerRanks:
    """`world_size` workers of one run, with torchrun's environment; rank 0 shares our standard output."""

    def __init__(self, directory: RunDirectory, world_size: int, servers: Path):
        self._logs = directory.logs
        (port,) = free_ports(1)
        self._processes = []
        for rank in range(world_size):
            log = open(self._log(rank), "ab")  # noqa: SIM115 - the child keeps it
            worker = [sys.executable, "-m", "exprl_megatron.training.worker", str(directory.root)]
            # What a rank starts (checkpoint writers, verifiers) must end with it, even by kill -9.
            command = [sys.executable, "-E", "-S", supervise.__file__, str(os.getpid()), *worker]
            self._processes.append(
                subprocess.Popen(
                    [*command, "--servers", str(servers)],
                    env=_environment(rank, world_size, port),
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else log,
                    stderr=log,
                )
            )
            log.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks' supervisors."""
        return [process.pid for process in self._processes]

    def running(self) -> bool:
        """Whether all ranks still run; False when all ended well. Raises what ended the first that failed."""
        states = [process.poll() for process in self._processes]
        failed = [rank for rank, state in enumerate(states) if state not in (None, 0)]
        if failed:
            self._await_last_words()
            raise self._cause(failed)
        return any(state is None for state in states)

    def stop(self) -> None:
        """End all ranks: politely, then not."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _await_last_words(self) -> None:
        """A rank that only follows may end before the one that knows the reason."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(0.05)

    def _cause(self, failed: list[int]) -> Exception:
        """What the first rank that knows says; ranks that only follow another's failure say nothing."""
        for rank in range(len(self._processes)):
            end = self._logs / f"trainer-{rank}.end"
            if end.is_file():
                told = json.loads(end.read_text())
                return _ENDS.get(told["status"], RunStopped)(told["message"])
        rank = failed[0]
        status = self._processes[rank].returncode
        how = f"was killed by signal {status - 128}" if status > 128 else f"ended with status {status}"
        return RunStopped(f"trainer-{rank} {how}; go on with --resume.{log_tail(self._log(rank))}")

    def _log(self, rank: int) -> Path:
        return self._logs / f"trainer-{rank}.log"


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    rendezvous = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # Several ranks share the cores: one thread each, unless the user says otherwise.
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(os.environ) | rendezvous
