"""Starts a run's processes on this machine; on a CPU they are forked from processes with loaded libraries."""

import os

from exprl_megatron.config.run import RunConfig
from exprl_megatron.launch.input_checks import INPUT_CHECKS
from exprl_megatron.launch.ranks import WORKER, rank_environment
from exprl_megatron.processes.fork_server import ForkServer
from exprl_megatron.processes.starter import Starter
from exprl_megatron.serving.server_command import SERVER, server_environment
from exprl_megatron.utils.accelerator import uses_cuda


def starter(config: RunConfig, servers: bool) -> Starter:
    """Return the starter of this run's ranks, and of its servers if `servers`; close it at the end.

    On CUDA each process imports its libraries itself: a process with initialized CUDA must not be forked, and the
    libraries may initialize it when they are imported.
    """
    if uses_cuda():
        return Starter()
    deadline_s = config.server.start_deadline_s
    ranks = rank_environment(os.environ, config.server)
    fork_servers = [ForkServer("exprl_megatron.launch.trainer_preload", {WORKER, INPUT_CHECKS}, ranks, deadline_s)]
    if servers and (
        config.needs_sampling_servers
        or config.has_ref_server
        or (config.needs_judge and config.required_judge.has_servers)
    ):
        environment = server_environment(
            os.environ, cuda=False, tp=config.server.tp, cpu_threads=config.server.cpu_threads
        )
        fork_servers.append(ForkServer("exprl_megatron.serving.server_preload", {SERVER}, environment, deadline_s))
    return Starter(fork_servers)
