"""Supervises servers: registers each when it is ready and restarts a server that has died.

Why not supervisord or torch.distributed.elastic: a restart depends on the run (servers may not start while the trainer
uses their GPUs, and a run may ask for a restart), and elastic restarts all workers together.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from exprl_megatron.processes.starter import Starter
from exprl_megatron.serving.keys import fingerprint, read_key
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.server_process import Server, launch_servers, stop_servers
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.utils.cuda_environment import shared_text


class ServerSupervisor:
    """Supervises the servers of `specs` in `registry` from `start` to `stop`; call `poll` several times a second.

    `report` receives a line when a server is ready, and when one is restarted.
    """

    def __init__(
        self,
        specs: Sequence[ServerSpec],
        registry: Registry,
        starter: Starter | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        self._report = report
        self._started: dict[str, float] = {}
        self._starter = starter or Starter()
        self._specs = [replace(spec, key_file=registry.key_file) for spec in specs]
        self._registry = registry
        self._servers: dict[str, Server] = {}
        self._restarts = dict.fromkeys((spec.name for spec in specs), 0)
        self._waiting: set[str] = set()
        """Servers that have ended and will start again as soon as they are allowed to."""

    def start(self) -> None:
        """Start all servers and return at once. Raises UserError as launch_servers does."""
        for spec in self._specs:
            # An earlier attempt may have left its registration.
            self._registry.withdraw(spec.name)
        self._started = dict.fromkeys(self._restarts, time.monotonic())
        self._servers = {server.name: server for server in launch_servers(self._specs, self._starter)}

    @property
    def specs(self) -> Sequence[ServerSpec]:
        """Return the specs of the servers that it keeps running."""
        return self._specs

    def server(self, name: str) -> Server:
        """Return the current process of the server of that name."""
        return self._servers[name]

    def poll(self) -> None:
        """Register servers that have become ready; restart those that have died or that a run asked to restart.

        Raises ServerError where a server dies before it was ever ready, is not ready within its start_deadline_s, or
        would be restarted more often than `restarts` of its config allows.
        """
        for spec in self._specs:
            server = self._servers[spec.name]
            if spec.name in self._waiting:
                self._start_if_allowed(spec)
            elif not server.alive() and (server.registered or self._restarts[spec.name]):
                self._restart(spec, server, "died")
            elif server.registered and self._registry.requested_restart(spec.name) == server.instance_id:
                self._restart(spec, server, "fails again and again")
            elif not server.registered and server.ready():
                self._registry.register(self._registration(spec, server))
                server.registered = True
                self._report(f"{spec.name} is ready after {time.monotonic() - self._started[spec.name]:.1f} s")

    def stop(self) -> None:
        """Stop all servers and remove their registrations."""
        for name in self._servers:
            self._registry.withdraw(name)
        stop_servers(list(self._servers.values()))

    def _restart(self, spec: ServerSpec, server: Server, why: str) -> None:
        self._registry.withdraw(spec.name)
        if self._restarts[spec.name] == spec.config.restarts:
            raise server.end(f"{why} and has been restarted {spec.config.restarts} times (restarts of its config)")
        self._restarts[spec.name] += 1
        self._report(f"{spec.name} {why}; restart {self._restarts[spec.name]} of {spec.config.restarts}")
        server.stop()
        self._waiting.add(spec.name)
        self._start_if_allowed(spec)

    def _start_if_allowed(self, spec: ServerSpec) -> None:
        if self._registry.try_start(spec.name):
            self._waiting.discard(spec.name)
            self._started[spec.name] = time.monotonic()
            (self._servers[spec.name],) = launch_servers([spec], self._starter)

    def _registration(self, spec: ServerSpec, server: Server) -> RegisteredServer:
        return RegisteredServer(
            kind=server.name.rpartition("-")[0],
            name=server.name,
            url=server.url,
            log_file=str(server.log_file),
            instance_id=server.instance_id,
            run=fingerprint(read_key(server.key_file)),
            first_gpu=server.first_gpu,
            nccl=shared_text(os.environ, spec.config.extra_args, spec.config.tp),
        )
