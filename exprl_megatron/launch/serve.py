"""`exprl serve`: supervises one machine's share of a run's servers until the run has ended."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.launch.launcher import required_servers
from exprl_megatron.launch.preemption import ignore_sigusr1
from exprl_megatron.reporting.run_log import RunLog
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.registry import Kind, Registry
from exprl_megatron.serving.server_spec import ServerSpec, side_by_side
from exprl_megatron.serving.server_supervisor import ServerSupervisor
from exprl_megatron.utils.files import keep_private
from exprl_megatron.utils.ports import this_host

_POLL_S = 0.25


@dataclass(frozen=True)
class ServerShare:
    """The servers of node `node_rank` of `nodes`: server i belongs to node i modulo `nodes`."""

    node_rank: int
    nodes: int

    @classmethod
    def from_slurm(cls, node_rank: int | None = None, nodes: int | None = None) -> Self:
        """Build from the arguments and, for None, from Slurm's step; without a step this is the only node.

        Raises:
            UserError: `node_rank` is not below `nodes`.
        """
        if node_rank is None:
            node_rank = int(os.environ.get("SLURM_NODEID") or os.environ.get("SLURM_PROCID") or 0)
        if nodes is None:
            nodes = int(os.environ.get("SLURM_NNODES") or 1)
        if node_rank >= nodes:
            raise UserError(f"--node-rank is {node_rank}, but there are only {nodes} --nodes; count nodes from 0.")
        return cls(node_rank, nodes)

    def select(self, specs: Sequence[ServerSpec]) -> list[ServerSpec]:
        """Return the servers of `specs` that belong to this node."""
        return [spec for i, spec in enumerate(specs) if i % self.nodes == self.node_rank]


def serve(config: RunConfig, kind: Kind, share: ServerShare) -> None:
    """Start this node's share of the run's servers of `kind`, register them, and restart those that die.

    It returns when the run has ended. No process is left running in any case.

    Raises:
        UserError: the run has no such server, or its model cannot be served.
        ServerError: a server does not start or dies too often.
    """
    directory = RunDirectory(config.directory)
    if config.permissions == "private":
        keep_private(directory.root)
    specs = [spec for spec in required_servers(config, directory) if spec.name.startswith(f"{kind}-")]
    if not specs:
        raise UserError(f"--kind is {kind}, but no stage of this config needs such a server; use another kind.")
    registry = Registry(directory.registry)
    # An end that is recorded already belongs to an earlier attempt.
    earlier = registry.ended_at()
    # The logs are next to the registrations, since the run may not have its directory yet.
    selected = side_by_side(share.select(specs))
    started = [replace(spec, host=this_host(), log_dir=registry.directory) for spec in selected]
    ignore_sigusr1()
    supervisor = ServerSupervisor(started, registry, report=RunLog().say)
    try:
        supervisor.start()
        while registry.ended_at() in (None, earlier):
            supervisor.poll()
            time.sleep(_POLL_S)
    finally:
        supervisor.stop()
