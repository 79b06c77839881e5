"""What a server is started with, and whether it can be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.serving.served_model import check_served_model
from exprl_megatron.serving.server_command import server_command
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.ports import LOCAL, free_ports, interface, is_free

SERVED_DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}
"""What a server's `dtype` is for each `policy.precision.dtype`."""


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

    @property
    def key_path(self) -> Path:
        """The file with the key, also where `key_file` is None."""
        return self.key_file or self.log_dir / "key"


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


def side_by_side(specs: Sequence[ServerSpec], first_gpu: int = 0) -> list[ServerSpec]:
    """Return the servers on GPUs of their own, from `first_gpu` of this machine on."""
    placed = []
    for spec in specs:
        placed.append(replace(spec, first_gpu=first_gpu))
        first_gpu += spec.config.tp
    return placed


def check_servers(specs: Sequence[ServerSpec]) -> list[int]:
    """Return the ports that the servers would get now; starts nothing.

    Raises:
        UserError: a configured port is in use, or a model cannot be served.
    """
    ports = _ports(specs)
    for spec in {(type(spec), spec.model, spec.dtype, spec.config): spec for spec in reversed(specs)}.values():
        spec.check()
    return ports


def _address(spec: ServerSpec) -> str:
    """Return the address that the server listens at: an interface that others reach, where they need it."""
    return LOCAL if spec.host is None else interface(spec.host)


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
