"""Syncs by `broadcast` and `direct` from the trainer's processes to servers that come, hang and die."""

import os
from collections.abc import Mapping
from pathlib import Path

import psutil
from helpers.ranks import run_ranks

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.launch.ranks import rank_environment
from exprl_megatron.serving.server_process import Server
from exprl_megatron.utils.accelerator import uses_cuda
from on_device.compared import Compared, at_most, equal

TRANSPORTS = ("broadcast", "direct")
ALIKE = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
ROOM_S = 30.0
"""From a deadline, or a death, to the error about it: less than the other servers' deadline."""


def syncs(
    out: Path,
    model: Path,
    servers: Mapping[str, tuple[Server, Server]],
    *,
    precision: str,
    deadline_s: float,
    layout: Layout,
) -> list[Compared]:
    """For each transport a server that never comes, two syncs to a first server, its death in a third, a second server.

    `servers` are, for each transport, the one that is killed and the one that takes its place. The trainer's processes
    have the environment that `exprl train` gives its ranks.
    """
    handed = {
        kind: [
            {"name": server.name, "url": server.url, "pid": server.pid, "key_file": str(server.key_file)}
            for server in pair
        ]
        for kind, pair in servers.items()
    }
    variables = rank_environment(os.environ, ServerConfig())
    served = psutil.Process(next(iter(servers.values()))[-1].pid).environ()
    results = run_ranks(
        Path(__file__).with_name("syncs_worker.py"),
        layout.world_size,
        out,
        torchrun=uses_cuda(),
        environment=variables,
        model=model,
        servers=handed,
        layout=layout.model_dump(mode="json"),
        precision=precision,
        deadline_s=deadline_s,
    )
    compared = [equal(f"{name} of trainer and server", variables[name], served.get(name)) for name in ALIKE]
    for kind, pair in servers.items():
        compared += _rows(kind, results[kind], [server.name for server in pair], deadline_s)
    return compared


def _rows(kind: str, result: dict, names: list[str], deadline_s: float) -> list[Compared]:
    compared = [
        equal(f"{kind}: syncs whose checksums agreed", [m["sync/check"] > 0 for m in result["metrics"]], [True] * 3),
        equal(f"{kind}: servers that failed", len(result["failures"]), 2),
        equal(f"{kind}: version after all", result["version"], f"{kind}-3"),
    ]
    for failure, what, name, most in zip(
        result["failures"],
        ("never comes", "dies in a sync"),
        ("absent", names[0]),
        (deadline_s + ROOM_S, ROOM_S),
        strict=False,
    ):
        compared.append(at_most(f"{kind}: seconds until a server that {what} is reported", failure["seconds"], most))
        compared.append(equal(f"{kind}: the error names it", failure["error"].partition(" ")[0], name))
    return compared
