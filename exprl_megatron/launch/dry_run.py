"""`exprl train --dry-run`: prints the resolved config and the processes that a run would start."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import yaml
from rich.console import Console
from rich.table import Table

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.transport import choose_transport
from exprl_megatron.models.routing import with_router_replay
from exprl_megatron.serving.router_spec import JUDGE_ROUTER, ROUTER


@dataclass(frozen=True)
class PlannedProcess:
    """One process of a run."""

    name: str
    what: str
    where: str


def planned_processes(config: RunConfig) -> list[PlannedProcess]:
    """Return the servers and trainer ranks of a run in the order in which they start."""
    planned = []
    if config.needs_sampling_servers:
        planned += [_server("policy", i, config.policy.model, config.server) for i in range(config.server.count)]
    if config.needs_sampling_servers and config.server.router:
        planned.append(PlannedProcess(ROUTER, "sglang-router in front of the policy's servers", "a free port"))
    if config.has_ref_server:
        planned.append(_server("ref", 0, config.policy.model, config.ref_server))
    if config.needs_judge and config.required_judge.has_servers:
        judge = config.required_judge
        planned += [_server("judge", i, judge.served_model, judge.server) for i in range(judge.server.count)]
        if judge.server.router:
            planned.append(PlannedProcess(JUDGE_ROUTER, "sglang-router in front of the judge's servers", "a free port"))
    layout = config.policy.layout
    for rank in range(layout.world_size):
        # Megatron numbers ranks in this order, from the innermost dimension outwards.
        coordinates, rest = [], rank
        for name, size in (("tp", layout.tp), ("cp", layout.cp), ("dp", layout.dp), ("pp", layout.pp)):
            coordinates.append(f"{name} {rest % size}")
            rest //= size
        role = "trainer, coordinator" if rank == 0 else "trainer"
        planned.append(PlannedProcess(f"trainer-{rank}", role, ", ".join(coordinates)))
    return planned


def _server(kind: str, number: int, model: str, server) -> PlannedProcess:
    port = "a free port" if server.port is None else f"port {server.port + number}"
    return PlannedProcess(f"{kind}-{number}", f"SGLang server of {model}, tp {server.tp}", port)


def transport_lines(config: RunConfig) -> list[str]:
    """Return one line for each kind of server that receives weights: its transport and the reason."""
    receiving: dict[Literal["policy", "ref"], tuple[str, bool]] = {
        "policy": ("the sampling servers", config.needs_sampling_servers),
        "ref": ("ref-0", config.has_ref_server),
    }
    lines = []
    for servers, (what, exist) in receiving.items():
        if exist:
            choice = choose_transport(config, servers)
            lines.append(f"Weights are sent to {what} by {choice.kind} ({choice.reason}).")
    return lines


def print_dry_run(config: RunConfig) -> None:
    """Print the config as a run on this machine would record it, the processes, and how weights travel to servers."""
    config = with_router_replay(config.with_precision())
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    table = Table("process", "what", "where")
    for process in planned_processes(config):
        table.add_row(process.name, process.what, process.where)
    Console().print(table)
    for line in transport_lines(config):
        print(line)


def print_start(config: RunConfig, check_servers: Callable[[RunConfig], None] = lambda config: None) -> None:
    """Check what a start would check, and print what it would start.

    `check_servers` does the checks of a start on this machine besides the inputs; it is not called where a model is
    on another machine.

    Raises:
        UserError: see `check_inputs`.
    """
    # Imported here: the launcher imports this module, and must not import anything that reads models.
    from exprl_megatron.launch.preflight import dry_run

    left_out = dry_run(config)
    if left_out is None:
        check_servers(config)
    print_dry_run(config)
    print_differences_from_released(config)
    if left_out is None:
        print_prompts(config)
    else:
        print(f"exprl: {left_out}", file=sys.stderr)


def print_differences_from_released(config: RunConfig) -> None:
    """Print how the run differs from the released one that `reproduce` asks for."""
    for sentence in config.deviations:
        print(f"exprl: {sentence}", file=sys.stderr, flush=True)


def print_prompts(config: RunConfig) -> None:
    """Print one problem of each stage as the policy and the judge read it; only the judge's text has the reference."""
    from exprl_megatron.launch.prompt_checks import preview_prompts

    for title, text in preview_prompts(config):
        print(f"\n---- {title}\n{text}")
