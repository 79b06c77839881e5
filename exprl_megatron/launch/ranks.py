"""The trainer's ranks on this machine: starts, watches and stops them, and reads how they ended.

launch/nodes.py gives the reasons against torch.distributed.elastic.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.launch.exit_reports import ExitReport, RankKilled, exit_error, parse_exit_report
from exprl_megatron.launch.nodes import Node
from exprl_megatron.processes.child import Child
from exprl_megatron.processes.heartbeat import SILENCE_S, RankHeartbeat, states
from exprl_megatron.processes.log_tail import log_tail
from exprl_megatron.processes.starter import Starter
from exprl_megatron.processes.supervise import HEARTBEAT
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.utils.accelerator import environment, hide_unused_cuda, uses_cuda
from exprl_megatron.utils.cuda_environment import rank_variables
from exprl_megatron.utils.ports import LOCAL, free_ports

WORKER = "exprl_megatron.training.worker"
_STOP_S = 10.0
_CAUSE_GRACE_S = 3.0


class TrainerRanks:
    """The ranks of one run on one node, with torchrun's environment; rank 0 shares this process's standard output.

    Args:
        directory: directory of the run.
        config: config of the run.
        servers: directory in which the servers are registered.
        node: this node; None: it is the only one.
        starter: starts the processes.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        servers: Path,
        node: Node | None = None,
        starter: Starter | None = None,
    ):
        starter = starter or Starter()
        self._logs = directory.logs
        self._world_size = config.policy.layout.world_size
        node = node or Node()
        ranks = node.ranks(self._world_size)
        rendezvous = _rendezvous(node)
        hide_unused_cuda()
        self._processes: dict[int, Child] = {}
        self._pulses = {rank: RankHeartbeat() for rank in ranks}
        for rank in ranks:
            # An earlier attempt may have written it.
            self._end(rank).unlink(missing_ok=True)
            log = open(self._log(rank), "ab")  # noqa: SIM115 - the child keeps it
            worker = [sys.executable, "-m", WORKER, str(directory.root)]
            # Processes that a rank starts (checkpoint writers, verifiers) must end with it, even by kill -9.
            place = {"RANK": rank, "LOCAL_RANK": rank - ranks.start, "WORLD_SIZE": self._world_size}
            self._processes[rank] = starter.start(
                f"trainer-{rank}",
                [*worker, "--servers", str(servers)],
                rank_environment(os.environ, config.server)
                | {name: str(number) for name, number in place.items()}
                | rendezvous,
                None if rank == 0 else log,
                log,
                inherited={HEARTBEAT: self._pulses[rank].file},
            )
            log.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks' supervisors."""
        return [process.pid for process in self._processes.values()]

    def running(self) -> bool:
        """Return whether ranks still run; False when all have ended successfully.

        Raises:
            UserError, RunStopped, Preempted: the error of the rank that failed first.
        """
        # Before the failures are looked for: a rank may fail in between.
        alive = self.alive()
        if self._failed():
            self._wait_for_cause()
            raise self._cause(self._failed())
        self._require_heartbeats()
        return alive

    def _failed(self) -> list[int]:
        """Return the ranks that have failed."""
        return [rank for rank, process in self._processes.items() if process.poll() not in (None, 0)]

    def alive(self) -> bool:
        """Return whether any rank still runs."""
        return any(process.poll() is None for process in self._processes.values())

    def stop(self) -> None:
        """Stop all ranks: by SIGTERM, then by SIGKILL."""
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
        for pulse in self._pulses.values():
            pulse.close()

    def _require_heartbeats(self) -> None:
        """Raise RunStopped where a rank is alive but sends no heartbeat."""
        silent = [rank for rank, pulse in self._pulses.items() if pulse.silent_s() > SILENCE_S]
        for rank in silent:
            process = self._processes[rank]
            found = states(process.pid) if process.poll() is None else []
            # A debugger holds it.
            if found and psutil.STATUS_TRACING_STOP not in found:
                raise RunStopped(
                    f"trainer-{rank} (process {process.pid} supervises it) has sent no heartbeat for {SILENCE_S:g} s, "
                    f"its state is {', '.join(found)}; check what stops it, and continue with --resume."
                    f"{log_tail(self._log(rank))}"
                )

    def _wait_for_cause(self) -> None:
        """Wait for the rank that knows the cause: the other ranks may end before it."""
        deadline = time.monotonic() + _CAUSE_GRACE_S
        while time.monotonic() < deadline and self.alive():
            time.sleep(0.05)

    def _cause(self, failed: list[int]) -> Exception:
        """Return the first cause: a rank that was killed by a signal comes before lost connections of other ranks.

        An expected error of a rank comes next. SIGABRT comes late, since NCCL aborts ranks whose peers have left.
        """
        reported = {rank: self._reported(rank) for rank in failed if self._end(rank).is_file()}
        killed = {rank: number for rank in failed if rank not in reported and (number := self._signal(rank))}
        for rank, number in killed.items():
            if number != signal.SIGABRT:
                return self._killed(rank, number)
        for end in sorted(reported.values(), key=lambda end: end.unexpected):
            if not (end.unexpected and killed):
                return exit_error(end)
        if killed:
            return self._killed(*next(iter(killed.items())))
        # The rank with the cause may be on another node.
        for rank in range(self._world_size):
            if self._end(rank).is_file():
                return exit_error(self._reported(rank))
        rank = failed[0]
        status = self._processes[rank].returncode
        return RunStopped(
            f"trainer-{rank} ended with status {status}; continue with --resume.{log_tail(self._log(rank))}"
        )

    def _reported(self, rank: int) -> ExitReport:
        return parse_exit_report(self._end(rank).read_bytes(), f"What trainer-{rank} reported")

    def _signal(self, rank: int) -> int:
        """Return the signal that ended the rank, or 0."""
        status = self._processes[rank].returncode
        if status is None:
            return 0
        # The status of a supervisor that was itself killed is negative.
        return -status if status < 0 else max(0, status - 128)

    def _killed(self, rank: int, number: int) -> RankKilled:
        name = signal.Signals(number).name if number in set(signal.Signals) else "an unknown one"
        hint = "; SIGKILL is often the kernel's, for lack of memory (see dmesg)" if number == signal.SIGKILL else ""
        return RankKilled(
            f"trainer-{rank} was killed by signal {number} ({name}){hint}; continue with --resume."
            f"{log_tail(self._log(rank))}"
        )

    def _end(self, rank: int) -> Path:
        return self._logs / f"trainer-{rank}.end"

    def _log(self, rank: int) -> Path:
        return self._logs / f"trainer-{rank}.log"


def _rendezvous(node: Node) -> dict[str, str]:
    """Return the rendezvous of the ranks: the store of node 0's launcher, or rank 0 where all ranks are here."""
    if node.port is None:
        return {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(free_ports(1)[0])}
    return {"MASTER_ADDR": node.host, "MASTER_PORT": str(node.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def rank_environment(inherited: Mapping[str, str], server: ServerConfig) -> dict[str, str]:
    """Return the environment of a rank that sends weights to such servers, without its rank number."""
    # Several ranks share the cores, so each has one thread unless the user sets another number.
    found = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(inherited)
    return found | rank_variables(inherited, server.extra_args, server.tp) | environment(uses_cuda())
