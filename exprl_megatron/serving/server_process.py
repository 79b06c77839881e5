"""Starts SGLang servers side by side, watches them while they start, and stops them."""

import hashlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exprl_megatron.errors import ServerError
from exprl_megatron.processes.child import Child
from exprl_megatron.processes.log_tail import log_tail
from exprl_megatron.processes.starter import Starter
from exprl_megatron.serving.health import healthy
from exprl_megatron.serving.keys import KEY_FILE, authorization, ensure_key
from exprl_megatron.serving.server_command import server_environment
from exprl_megatron.serving.server_spec import ServerSpec, check_servers
from exprl_megatron.utils.accelerator import hide_unused_cuda, uses_cuda
from exprl_megatron.utils.ports import LOCAL, gloo_on_loopback

if TYPE_CHECKING:
    from exprl_megatron.serving.client import SGLangClient

_POLL_S = 0.25
_CUDA_GRACE_S = 30.0
"""SGLang looks every 5 s whether it was asked to stop, and then gives its GPUs' memory back. On a CPU there is none."""


def server_seed(run_seed: int, name: str, instance_id: str) -> int:
    """Return the seed of a server's start for requests whose own seed it ignores: 31 bits of SHA-256.

    With one seed for all, servers would draw the same noise for different prompts, and a server that is started again
    would repeat what it drew before.
    """
    key = repr((run_seed, name, instance_id)).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


class Server:
    """A started server; `with server:` stops it at the end."""

    def __init__(self, spec: ServerSpec, instance_id: str, url: str, log_file: Path, process: Child):
        self.name = spec.name
        self.url = url
        self.log_file = log_file
        self.key_file = spec.key_path
        self.instance_id = instance_id
        """Tells this start of the server from every other one."""
        self.first_gpu = spec.first_gpu
        self.registered = False
        """Whether its supervisor has registered it."""
        self._config = spec.config
        self._process = process
        self._started = time.monotonic()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process that supervises the server; SIGTERM to it stops the server."""
        return self._process.pid

    def alive(self) -> bool:
        """Return whether the server's process runs."""
        return self._process.poll() is None

    def client(self) -> "SGLangClient":
        """Return a client with this server's name, log file and request deadline."""
        from exprl_megatron.serving.client import SGLangClient

        client = SGLangClient(
            self.url, self.name, self.log_file, self._config.request_deadline_s, authorization(self.key_file)
        )
        client.first_gpu = self.first_gpu
        return client

    def ready(self) -> bool:
        """Return whether the server answers /health.

        Raises ServerError where it has died, or start_deadline_s, counted from its start, has passed.
        """
        status = self._process.poll()
        if status is not None:
            raise self._error(f"ended with status {status} while starting")
        if healthy(self.url):
            return True
        deadline_s = self._config.start_deadline_s
        if time.monotonic() - self._started > deadline_s:
            raise self._error(f"did not answer /health within start_deadline_s ({deadline_s:g} s)")
        return False

    def ask_to_stop(self) -> None:
        """Begin to end the server, without waiting."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End the server and every process it started; does nothing where it has ended."""
        self.ask_to_stop()
        self._process.wait()

    def end(self, what: str) -> ServerError:
        """Return the error for a run that ends because this server did `what`."""
        return self._error(f"{what}; continue with --resume")

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{self.name} ({self.url}) {what}.{log_tail(self.log_file)}")


def launch_servers(specs: Sequence[ServerSpec], starter: Starter | None = None) -> list[Server]:
    """Start all processes side by side, by `starter` or by exec, and return at once; `wait_servers` before use.

    Raises UserError, before anything is started, where a configured port is in use or a model
    directory is none.
    """
    ports = check_servers(specs)
    hide_unused_cuda()
    starter = starter or Starter()
    return [_launch(spec, port, starter) for spec, port in zip(specs, ports, strict=True)]


def wait_servers(servers: Sequence[Server]) -> None:
    """Return when all are ready; where one fails, all are stopped and its ServerError is raised."""
    try:
        waiting = list(servers)
        while waiting := [server for server in waiting if not server.ready()]:
            time.sleep(_POLL_S)
    except BaseException:
        stop_servers(servers)
        raise


def start_servers(specs: Sequence[ServerSpec], starter: Starter | None = None) -> list[Server]:
    """Call `launch_servers`, then `wait_servers`."""
    servers = launch_servers(specs, starter)
    wait_servers(servers)
    return servers


def stop_servers(servers: Sequence[Server]) -> None:
    """End all servers, side by side."""
    for server in servers:
        server.ask_to_stop()
    for server in servers:
        server.stop()


def _launch(spec: ServerSpec, port: int, starter: Starter) -> Server:
    spec.log_dir.mkdir(parents=True, exist_ok=True)
    log_file = spec.log_dir / f"{spec.name}.log"
    ensure_key(spec.key_path)
    instance_id = uuid.uuid4().hex[:8]
    spec = replace(spec, seed=server_seed(spec.seed, spec.name, instance_id))
    environment = server_environment(
        os.environ,
        cuda=uses_cuda(),
        tp=spec.config.tp,
        extra_args=spec.config.extra_args,
        cpu_threads=spec.config.cpu_threads,
    )
    with open(log_file, "ab") as log:
        process = starter.start(
            spec.name,
            spec.command(port),
            environment | {KEY_FILE: str(spec.key_path)} | (gloo_on_loopback(os.environ) if spec.host is None else {}),
            log,
            log,
            grace_s=_CUDA_GRACE_S if uses_cuda() else 0.0,
        )
    return Server(spec, instance_id, f"http://{spec.host or LOCAL}:{port}", log_file, process)
