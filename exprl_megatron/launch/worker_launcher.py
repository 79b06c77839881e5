"""`exprl train` on the trainer's worker nodes: runs their ranks until the head node ends."""

import os
import signal
import time

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import Preempted, RunStopped, UserError
from exprl_megatron.launch.nodes import Node, WorkerNode
from exprl_megatron.launch.ranks import TrainerRanks
from exprl_megatron.launch.starting import starter
from exprl_megatron.processes.starter import Starter
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.registry import Registry

_POLL_S = 0.2
_BEFORE_S = 600.0
"""Maximum time in seconds in which node 0 checks the run's inputs before it waits for servers."""
_LAST_RANKS_S = 20.0


def run_worker_node(config: RunConfig, node: Node) -> None:
    """Run this node's ranks of `config` until node 0 ends; node 0 reports how the run ended.

    No process is left running.

    Raises:
        UserError: the ranks cannot be divided among the nodes.
        RunStopped: node 0 does not start, or is gone without a report.
    """
    # Slurm sends it to every node, and node 0 handles it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if config.permissions == "private":
        os.umask(0o077)
    node.ranks(config.policy.layout.world_size)
    worker = WorkerNode(node, Registry(RunDirectory(config.directory).registry).key_file)
    with starter(config, servers=False) as start:
        if worker.wait_for_start(_BEFORE_S + config.server.start_deadline_s):
            _run(config, node, worker, start)
    worker.leave()


def _run(config: RunConfig, node: Node, worker: WorkerNode, start: Starter) -> None:
    """Start the ranks, and stop them when node 0 has ended."""
    directory = RunDirectory(config.directory)
    ranks = TrainerRanks(directory, config, directory.registry, node, start)
    try:
        _watch(ranks, worker)
    finally:
        ranks.stop()


def _watch(ranks: TrainerRanks, worker: WorkerNode) -> None:
    """Wait until node 0 has ended, and give the ranks time to end as well."""
    failed = False
    while not worker.has_ended():
        if not failed:
            failed = _has_failed(ranks, worker)
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _LAST_RANKS_S
    while not failed and ranks.alive() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _has_failed(ranks: TrainerRanks, worker: WorkerNode) -> bool:
    """Return whether a rank has failed; notifies node 0 in that case."""
    try:
        ranks.running()
    except Preempted:
        # Node 0 knows, and may still be writing.
        return True
    except (RunStopped, UserError) as error:
        worker.report(error)
        return True
    return False
