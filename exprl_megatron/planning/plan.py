"""Plans a run: memory and seconds of every phase, what does not fit, and better layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.config.transport import TransportKind
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, layout_violations, position_violations
from exprl_megatron.models.precision_matrix import BLACKWELL, HOPPER, Setting, precision_violations
from exprl_megatron.models.served_policy import served_violations
from exprl_megatron.planning.colocation import gpu_left_for_trainer, server_faults, with_sleeping_side
from exprl_megatron.planning.hardware import GIB, Gpu
from exprl_megatron.planning.layouts import Ranking, TrainerPlan, plan_trainer, rank_layouts
from exprl_megatron.planning.memory import (
    USABLE,
    HostBytes,
    Memory,
    host_memory,
    log_prob_memory,
    reshard_memory,
    resident_memory,
    routed_experts_bytes,
)
from exprl_megatron.planning.parameters import model_parameters, rank_counts
from exprl_megatron.planning.phases import Phase, Speed, speed_of
from exprl_megatron.planning.rl_time import host_swap_time, save_time
from exprl_megatron.planning.serving_phases import ref_server_phase, serving_phases
from exprl_megatron.planning.serving_time import ServerHardware, prefill_seconds
from exprl_megatron.planning.sync_time import sync_plans, sync_seconds
from exprl_megatron.planning.targets import assumed_architecture, find_architecture
from exprl_megatron.planning.workload import Workload

if TYPE_CHECKING:
    from exprl_megatron.planning.sync_broadcast import SyncPlan

STORAGE_BYTES_PER_S = 2e9
"""Bytes per second at which each trainer node writes its part of a checkpoint (assumed)."""


@dataclass(frozen=True)
class GpuAllocation:
    """One allocation of GPUs, with its best layout and servers."""

    gpus: dict[str, int]
    """GPUs by device kind."""
    servers: dict[str, int]
    """GPUs of each server by device kind."""
    trainer: TrainerPlan
    seconds: dict[str, float]
    """Of each phase of a step."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Plan:
    """The result of `exprl plan`."""

    config: RunConfig
    """With the layout and the servers that were planned."""
    given: RunConfig
    """The config as it was given."""
    gpu: Gpu
    gpus: dict[str, int]
    """GPUs by device kind."""
    workload: Workload
    trainer: TrainerPlan
    phases: list[Phase]
    host: HostBytes
    """Host memory of the trainer's rank that needs most."""
    routed_experts: float = 0.0
    """Bytes of rank 0's host memory for the experts that servers chose for the tokens of a step."""
    ref_policy: dict[str, float] = field(default_factory=dict)
    """What either choice of `policy.ref_policy` costs; empty where no stage needs it."""
    faults: list[str] = field(default_factory=list)
    """One sentence for each part that does not fit or cannot be built."""
    notes: list[str] = field(default_factory=list)
    """Assumptions of the plan."""
    ranking: Ranking | None = None
    """The best layouts of the same number of trainer GPUs; None where none fits."""
    syncs: Mapping[TransportKind, SyncPlan] = field(default_factory=dict)
    """Of the weights, by each transport that suits the placement, the run's own first; empty where none serves."""
    allocations: tuple[GpuAllocation, ...] = ()
    """Allocations of the GPUs to trainer and servers, the best first, if requested."""

    @property
    def step_s(self) -> float:
        """Seconds of a step: phases in turn, as the loop runs them."""
        return sum(phase.seconds for phase in self.phases)


def allocation_of(plan: Plan) -> GpuAllocation:
    """Return the plan's own allocation."""
    config = plan.config
    servers = {"policy server": config.server.tp, "ref server": config.server.tp}
    if config.judge is not None:
        servers["judge server"] = config.judge.server.tp
    return GpuAllocation(
        gpus=plan.gpus,
        servers={kind: size for kind, size in servers.items() if kind in plan.gpus},
        trainer=plan.trainer,
        seconds={phase.name: phase.seconds for phase in plan.phases},
    )


def plan(config: RunConfig, stage: Stage, workload: Workload, gpu: Gpu) -> Plan:
    """Return the step of `stage` as the config lays it out.

    Raises:
        UserError: a model is not found.
    """
    architecture, known = find_architecture(config.policy.model)
    notes = [assumed_architecture(config.policy.model, known)] if known else []
    faults = _illegal(config, stage, architecture, workload, gpu)
    if layout_violations(architecture, config.policy.layout) or not _is_modeled(config, gpu):
        raise UserError("\n".join(faults))
    one = plan_trainer(architecture, config.policy, stage.optimizer, workload, gpu)
    phases = serving_phases(config, architecture, workload, gpu, faults, notes) if workload.sampled else []
    start = _ref_policy_costs(config, stage, architecture, workload, gpu, one) if workload.keeps_ref_policy else {}
    if start and config.policy.ref_policy == "server":
        phases += ref_server_phase(config, architecture, workload, gpu, start["server_score_s"], faults)
    phases += _trainer(config, stage, architecture, workload, gpu, one)
    colocated = config.placement.kind == "colocated" and workload.sampled
    if colocated:
        phases = with_sleeping_side(phases, config, architecture)
        faults += server_faults(phases, config.sampling_server, gpu)
    faults += [
        _memory_fault(phase, gpu, one)
        for phase in phases
        if phase.device == "trainer" and phase.memory.excess_bytes(gpu) > 0
    ]
    stages = range(config.policy.layout.pp)
    hosts = [
        host_memory(architecture, config.policy, stage.optimizer, r, workload.keeps_ref_policy, colocated)
        for r in stages
    ]
    return Plan(
        config=config,
        given=config,
        gpu=gpu,
        gpus=_gpus(config, workload),
        workload=workload,
        trainer=one,
        phases=phases,
        host=max(hosts, key=lambda host: host.total),
        routed_experts=routed_experts_bytes(architecture, config, workload.tokens) if workload.sampled else 0.0,
        ref_policy=start,
        faults=faults,
        notes=list(dict.fromkeys(notes)),
    )


def with_syncs(planned: Plan) -> Plan:
    """Return the plan with its weight syncs."""
    if not planned.workload.sampled:
        return planned
    architecture, _ = find_architecture(planned.config.policy.model)
    return replace(planned, syncs=sync_plans(planned.config, architecture, planned.gpu))


def ranked(config: RunConfig, stage: Stage, workload: Workload, gpu: Gpu, gpus: int) -> Ranking:
    """Return the best layouts of `gpus` trainer GPUs for the config's policy. Raises UserError where none fits."""
    architecture, _ = find_architecture(config.policy.model)
    room = gpu_left_for_trainer(config, gpu) if workload.sampled else gpu
    return rank_layouts(architecture, config.policy, stage.optimizer, workload, room, gpus)


def _gpus(config: RunConfig, workload: Workload) -> dict[str, int]:
    gpus = {"trainer": config.policy.layout.world_size}
    if workload.sampled:
        gpus["policy server"] = config.server.count * config.server.tp
    if workload.judgements and config.required_judge.has_servers:
        gpus["judge server"] = config.required_judge.server.count * config.required_judge.server.tp
    if workload.keeps_ref_policy and config.policy.ref_policy == "server":
        gpus["ref server"] = config.server.tp
    return gpus


def _trainer(config, stage, architecture, workload, gpu, one: TrainerPlan) -> list[Phase]:
    policy, optimizer = config.policy, stage.optimizer
    phases = []
    if one.log_probs is not None:
        memory = _fullest(policy.layout.pp, lambda rank: log_prob_memory(architecture, policy, optimizer, rank, gpu))
        seconds = one.log_probs_s
        if workload.keeps_ref_policy and policy.ref_policy == "host":
            seconds += _swap_seconds(architecture, config, gpu, one)
        phases.append(Phase("log-probs", "trainer", seconds, memory, _speed(one.log_probs, one.passes, seconds)))
    speed = _speed(one.training, one.updates, one.training_s)
    phases.append(Phase("train", "trainer", one.training_s, one.memory, speed))
    if workload.sampled:
        bucket = config.sync.bucket_mb * 2**20
        memory = _fullest(
            policy.layout.pp, lambda rank: reshard_memory(architecture, policy, optimizer, rank, bucket, gpu)
        )
        phases.append(Phase("reshard", "trainer", sync_seconds(config, architecture, gpu), memory))
    memory = _fullest(policy.layout.pp, lambda rank: resident_memory(architecture, policy, optimizer, rank, gpu))
    state = model_parameters(architecture) * (12 if policy.precision.dtype == "fp32" else 14)
    nodes = max(1, policy.layout.world_size // gpu.gpus_per_node)
    seconds = save_time(state, nodes * STORAGE_BYTES_PER_S) / config.checkpoint.every_steps
    return [*phases, Phase("save", "trainer", seconds, memory)]


def _ref_policy_costs(config, stage, architecture, workload, gpu, one) -> dict[str, float]:
    """Return the costs of both placements of the frozen weights: host memory of a rank, or the GPUs of a server.

    Either reads the step's traces once more: the trainer after a swap, the server on its own GPUs.
    """
    policy, layout = config.policy, config.policy.layout
    host = policy.model_copy(update={"ref_policy": "host"})
    kept = max(host_memory(architecture, host, stage.optimizer, rank, True).ref_policy for rank in range(layout.pp))
    read_there = plan_trainer(architecture, host, stage.optimizer, workload, gpu)
    wide = 4 if policy.precision.dtype == "fp32" else 2
    one_server = ServerHardware(1, config.server.tp, gpu)
    return {
        "host_bytes_per_rank": kept,
        "host_swap_s": _swap_seconds(architecture, config, gpu, one),
        "host_score_s": read_there.log_probs_s / read_there.passes,
        "server_weight_bytes_per_gpu": model_parameters(architecture) * wide / config.server.tp,
        "server_score_s": prefill_seconds(architecture, one_server, workload.tokens, workload.sequence_length),
    }


def _swap_seconds(architecture, config, gpu, one) -> float:
    """Return the seconds to swap the current weights for the reference policy's, and back."""
    counts = (rank_counts(architecture, one.layout, rank).total for rank in range(one.layout.pp))
    size = max(counts) * (4 if config.policy.precision.dtype == "fp32" else 2)
    return 2 * host_swap_time(size, gpu)


def _speed(time, times: int, seconds: float) -> Speed:
    """Return the speed of a phase that repeats `time`'s work; log-probs count a token once for each pass over it."""
    return speed_of(time.tokens * times, time.flops * times, seconds, time.gpus, (time.peak_name, time.peak_flops))


def _fullest(pp: int, memory_of) -> Memory:
    return max((memory_of(rank) for rank in range(pp)), key=lambda memory: memory.total)


def _illegal(config, stage, architecture: Architecture, workload, gpu) -> list[str]:
    setting = Setting(
        policy=config.policy,
        capability=BLACKWELL if gpu.blackwell else HOPPER,
        optimizers=(stage.optimizer,),
        architecture=architecture,
        starting_weights=workload.keeps_ref_policy,
    )
    return [
        *layout_violations(architecture, config.policy.layout),
        *position_violations(architecture, config.policy.max_tokens, config.policy.model),
        *served_violations(config, architecture, cuda=True),
        *(precision_violations(setting) if gpu.fp8_kinds else []),
    ]


def _is_modeled(config, gpu) -> bool:
    """Return whether the time model has a peak for the precision."""
    return not config.policy.precision.fp8 or config.policy.precision.kind in gpu.fp8_kinds


def _memory_fault(phase: Phase, gpu: Gpu, one: TrainerPlan) -> str:
    over = phase.memory.excess_bytes(gpu) / GIB
    return (
        f"{phase.name}: a trainer rank needs {over:.1f} GiB more than the {gpu.memory_bytes * USABLE / GIB:.1f} GiB "
        f"that may be filled of a {gpu.name}; {_remedy(phase, one)}."
    )


def _remedy(phase: Phase, one: TrainerPlan) -> str:
    memory = phase.memory
    if memory.activations > memory.optimizer and one.policy.recompute != "full":
        return "set policy.recompute to full, lower policy.micro_batch_tokens, or raise policy.layout.cp"
    if memory.optimizer > memory.weights + memory.gradients:
        return "raise policy.layout.dp, or set optimizer.offload"
    return "raise policy.layout.tp or pp"
