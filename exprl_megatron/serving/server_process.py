"""Starts SGLang servers side by side, watches them while they start, and stops them."""

import hashlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.processes.child import Child
from exprl_megatron.processes.log_tail import log_tail
from exprl_megatron.processes.starter import Starter
from exprl_megatron.serving.health import healthy
from exprl_megatron.serving.keys import KEY_FILE, authorization, ensure_key
from exprl_megatron.serving.served_model import check_served_model
from exprl_megatron.serving.server_command import server_command, server_environment
from exprl_megatron.utils.accelerator import hide_unused_cuda, uses_cuda
from exprl_megatron.utils.ports import LOCAL, free_ports, gloo_on_loopback, interface, is_free

if TYPE_CHECKING:
    from exprl_megatron.serving.client import SGLangClient

SERVED_DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}
"""What a server's `dtype` is for each `policy.precision.dtype`."""
_POLL_S = 0.25
_CUDA_GRACE_S = 30.0
"""SGLang looks every 5 s whether it was asked to stop, and then gives its GPUs' memory back. On a CPU there is none."""


@dataclass(frozen=True)
class ServerSpec:
    """One server to start."""

    name: str
    """As in messages and in the name of the log file: `policy-0`."""
    model: Path
    """Directory in Hugging Face form."""
    config: ServerConfig
    log_dir: Path
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    port: int | None = None
    """None picks a free one."""
    seed: int = 0
    """The run's. Each start of each server draws from a seed of its own that is made of it."""
    weight_version: str = "initial"
    """What traces carry until the first update."""
    host: str | None = None
    """The name under which other machines reach this one; None: only processes of this machine reach the server."""
    first_gpu: int = 0
    """On CUDA: of those that this process sees; a server of tensor parallelism takes the next ones too."""
    key_file: Path | None = None
    """The file with the key that each request needs; None: `key` next to the log."""

    def command(self, port: int) -> list[str]:
        """Return the program and its arguments."""
        return server_command(
            self.model,
            self.config,
            dtype=self.dtype,
            port=port,
            seed=self.seed,
            weight_version=self.weight_version,
            cuda=uses_cuda(),
            bind=_address(self),
            first_gpu=self.first_gpu,
        )

    def check(self) -> None:
        """Check that the model can be served in this dtype.

        Raises:
            UserError: it cannot.
        """
        check_served_model(self.model, self.name, self.config, uses_cuda())
        if self.dtype == "float32" and not self.config.names_attention_backend and uses_cuda():
            raise UserError(
                f"{self.name} would serve float32, in which SGLang's attention kernels on CUDA do not compute; choose "
                f"bfloat16 (policy.precision: bf16, or --dtype bfloat16 of `exprl eval`)."
            )


def server_specs(
    role: str,
    model: str | Path,
    config: ServerConfig,
    log_dir: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 0,
    weight_version: str = "initial",
) -> list[ServerSpec]:
    """Return the `config.count` servers `role-0`, `role-1`, ... of one model, on GPUs of their own from the
    first on.
    """
    specs = [
        ServerSpec(
            name=f"{role}-{i}",
            model=Path(model),
            config=config,
            log_dir=Path(log_dir),
            dtype=dtype,
            port=None if config.port is None else config.port + i,
            seed=seed,
            weight_version=weight_version,
        )
        for i in range(config.count)
    ]
    return side_by_side(specs)


def server_seed(run_seed: int, name: str, instance_id: str) -> int:
    """Return the seed of a server's start for requests whose own seed it ignores: 31 bits of SHA-256.

    With one seed for all, servers would draw the same noise for different prompts, and a server that is started again
    would repeat what it drew before.
    """
    key = repr((run_seed, name, instance_id)).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def side_by_side(specs: Sequence[ServerSpec], first_gpu: int = 0) -> list[ServerSpec]:
    """Return the servers on GPUs of their own, from `first_gpu` of this machine on."""
    placed = []
    for spec in specs:
        placed.append(replace(spec, first_gpu=first_gpu))
        first_gpu += spec.config.tp
    return placed


class Server:
    """A started server; `with server:` stops it at the end."""

    def __init__(self, spec: ServerSpec, instance_id: str, url: str, log_file: Path, process: Child):
        self.name = spec.name
        self.url = url
        self.log_file = log_file
        self.key_file = _key_file(spec)
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


def check_servers(specs: Sequence[ServerSpec]) -> list[int]:
    """Return the ports that the servers would get now; starts nothing. Raises as `launch_servers` does."""
    ports = _ports(specs)
    for spec in {(type(spec), spec.model, spec.dtype, spec.config): spec for spec in reversed(specs)}.values():
        spec.check()
    return ports


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
    ensure_key(_key_file(spec))
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
            environment
            | {KEY_FILE: str(_key_file(spec))}
            | (gloo_on_loopback(os.environ) if spec.host is None else {}),
            log,
            log,
            grace_s=_CUDA_GRACE_S if uses_cuda() else 0.0,
        )
    return Server(spec, instance_id, f"http://{spec.host or LOCAL}:{port}", log_file, process)


def _address(spec: ServerSpec) -> str:
    """Return the address that the server listens at: an interface that others reach, where they need it."""
    return LOCAL if spec.host is None else interface(spec.host)


def _key_file(spec: ServerSpec) -> Path:
    return spec.key_file or spec.log_dir / "key"


def _ports(specs: Sequence[ServerSpec]) -> list[int]:
    configured: dict[int, str] = {}
    for spec in specs:
        if spec.port is None:
            continue
        if spec.port in configured:
            raise UserError(
                f"Port {spec.port} is set for {configured[spec.port]} and for {spec.name}; set another port for one."
            )
        if not is_free(spec.port, _address(spec)):
            raise UserError(
                f"Port {spec.port}, configured for {spec.name}, is in use; set another port, or none to get a free one."
            )
        configured[spec.port] = spec.name
    free = iter(free_ports(sum(spec.port is None for spec in specs), set(configured)))
    return [next(free) if spec.port is None else spec.port for spec in specs]
