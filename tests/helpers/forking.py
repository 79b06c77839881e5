"""The fork servers of a test session: servers and ranks that tests start are forked, as in a run on a CPU.

What each of them imports for seven to ten seconds of a core is imported once for all tests of a process.
"""

import atexit
import functools
import os
from pathlib import Path

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.launch.ranks import WORKER, rank_environment
from exprl_megatron.processes.child import Child
from exprl_megatron.processes.fork_server import ForkRequest, ForkServer
from exprl_megatron.processes.starter import Starter
from exprl_megatron.serving.server_command import SERVER, server_environment
from exprl_megatron.utils.accelerator import uses_cuda

RANKS = "helpers.fork_ranks"
"""The program that runs a test's script in several ranks (see fork_ranks)."""
_TESTS = Path(__file__).parents[1]
_DEADLINE_S = 600.0


class _WhenAsked:
    """A fork server that starts with the first process that it is to fork."""

    def __init__(self, preload: str, programs: set[str], environment: dict[str, str], paths: list[Path]):
        self.programs = programs
        self._preload = preload
        path = [*map(str, paths), environment.get("PYTHONPATH", "")]
        self._environment = environment | {"PYTHONPATH": os.pathsep.join(part for part in path if part)}

    @functools.cached_property
    def _server(self) -> ForkServer:
        server = ForkServer(self._preload, self.programs, self._environment, _DEADLINE_S)
        atexit.register(server.close)
        return server

    def start(self, request: ForkRequest, descriptors: list[int]) -> Child:
        child = self._server.start(request, descriptors)
        assert child is not None, f"{self._preload} cannot be forked from: see stderr"
        return child


@functools.cache
def starter() -> Starter:
    """Forks servers and ranks, on CUDA starts them by exec; all of this process's tests share it, and none closes it.

    What is forked knows the test backend with NCCL's behavior (see under_nccl).
    """
    if uses_cuda():
        return Starter()
    backend = _TESTS / "nccl_backend"
    ranks = rank_environment(os.environ, ServerConfig())
    servers = server_environment(os.environ, cuda=False)
    return Starter(
        [
            _WhenAsked("exprl_megatron.launch.trainer_preload", {WORKER, RANKS}, ranks, [_TESTS, backend]),
            _WhenAsked("exprl_megatron.serving.server_preload", {SERVER}, servers, [backend]),
        ]
    )
