"""Memory where trainer and sampling servers are colocated: what the sleeping side still holds on a GPU."""

from dataclasses import replace

from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.planning.hardware import GIB, Gpu
from exprl_megatron.planning.memory import CONTEXT, GRAPH_BYTES, GROUP, communicators
from exprl_megatron.planning.parameters import model_parameters
from exprl_megatron.planning.phases import Phase


def sleeping_server_bytes(server: ServerConfig) -> float:
    """Return the GPU bytes of one rank of a sleeping server: its context, CUDA graphs and communicator."""
    return CONTEXT + GRAPH_BYTES + (GROUP if server.tp > 1 else 0)


def sleeping_trainer_bytes(policy: PolicyConfig) -> float:
    """Return the GPU bytes of an offloaded trainer rank: its context and communicators."""
    return CONTEXT + GROUP * communicators(policy.layout)


def with_sleeping_side(phases: list[Phase], config: RunConfig, architecture: Architecture) -> list[Phase]:
    """Return `phases` of a colocated run, each with what the other side holds on the same GPU meanwhile.

    While weights travel the trainer holds no gradients and no optimizer, and the servers hold their weights.
    """
    server = sleeping_server_bytes(config.server)
    served = model_parameters(architecture) * (1 if config.sync.fp8 else 2) / config.server.tp
    found = []
    for phase in phases:
        memory = phase.memory
        if phase.device == "policy server":
            memory = replace(memory, asleep=sleeping_trainer_bytes(config.policy))
        elif phase.device == "trainer" and phase.name == "reshard":
            memory = replace(memory, gradients=0, optimizer=0, asleep=server + served)
        elif phase.device == "trainer":
            memory = replace(memory, asleep=server)
        found.append(replace(phase, memory=memory))
    return found


def server_faults(phases: list[Phase], server: ServerConfig, gpu: Gpu) -> list[str]:
    """Return a sentence for each phase of a colocated server that has no room beside the sleeping trainer."""
    return [
        f"{phase.name}: with server.mem_fraction_static {server.memory_share:g} a server's weights, cache and "
        f"reserve ({(phase.memory.total - phase.memory.asleep) / GIB:.1f} GiB) and what the sleeping trainer holds "
        f"({phase.memory.asleep / GIB:.1f} GiB) are more than the {gpu.memory_bytes / GIB:.1f} GiB of a {gpu.name}; "
        f"lower it."
        for phase in phases
        if phase.device == "policy server" and phase.memory.total > gpu.memory_bytes
    ]


def gpu_left_for_trainer(config: RunConfig, gpu: Gpu) -> Gpu:
    """Return `gpu` as large as the trainer of `config` finds it while it learns."""
    if config.placement.kind == "separate" or not config.needs_sampling_servers:
        return gpu
    return replace(gpu, memory_bytes=int(gpu.memory_bytes - sleeping_server_bytes(config.server)))
