"""`exprl train` on the trainer's nodes other than node 0: their ranks, for as long as node 0 has a use for them."""

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
"""Node 0 looks at the run's inputs for so long at most before it waits for servers."""
_LAST_RANKS_S = 20.0


def follow(config: RunConfig, node: Node) -> None:
    """Run this node's ranks of `config` until node 0 ends; how the run ended is node 0's to say.

    Raises RunStopped where node 0 does not come, or goes without a word. No process is left behind.
    """
    # Slurm sends it to every node; node 0 answers.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if config.permissions == "private":
        os.umask(0o077)
    node.ranks(config.policy.layout.world_size)
    guest = WorkerNode(node, Registry(RunDirectory(config.directory).registry).key_file)
    with starter(config, servers=False) as start:
        if guest.await_beginning(_BEFORE_S + config.server.start_deadline_s):
            _run(config, node, guest, start)
    guest.part()


def _run(config: RunConfig, node: Node, guest: WorkerNode, start: Starter) -> None:
    """Start the ranks, and end them when node 0 has ended."""
    directory = RunDirectory(config.directory)
    ranks = TrainerRanks(directory, config, directory.registry, node, start)
    try:
        _watch(ranks, guest)
    finally:
        ranks.stop()


def _watch(ranks: TrainerRanks, guest: WorkerNode) -> None:
    """Return when node 0 has ended, and the ranks have had time to end as well."""
    failed = False
    while not guest.over():
        if not failed:
            failed = _has_failed(ranks, guest)
        time.sleep(_POLL_S)
    deadline = time.monotonic() + _LAST_RANKS_S
    while not failed and ranks.alive() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _has_failed(ranks: TrainerRanks, guest: WorkerNode) -> bool:
    """Whether a rank has failed, which node 0 is then notified of."""
    try:
        ranks.running()
    except Preempted:
        # Node 0 may still be writing; it knows.
        return True
    except (RunStopped, UserError) as error:
        guest.tell(error)
        return True
    return False
