"""Converts a plan to JSON values: bytes, seconds, tokens per second."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from exprl_megatron.planning.layouts import Ranking, TrainerPlan
from exprl_megatron.planning.memory import USABLE, HostBytes, Memory
from exprl_megatron.planning.overrides import overrides
from exprl_megatron.planning.phases import Phase
from exprl_megatron.planning.plan import GpuAllocation, Plan

if TYPE_CHECKING:
    from exprl_megatron.planning.sync_broadcast import SyncPlan

CAUSES = {
    "gemm_s": "matrix products",
    "attention_s": "attention",
    "memory_bound_s": "norms, activations, casts",
    "recompute_s": "recomputation",
    "head_s": "output layer and loss",
    "tp_comm_s": "tensor-parallel transfers",
    "cp_comm_s": "context-parallel transfers",
    "ep_comm_s": "expert-parallel transfers",
    "pp_s": "pipeline bubble and sends",
    "dp_comm_s": "gradients and parameters",
    "optimizer_s": "optimizer",
    "ragged_s": "traces of many lengths",
}


def update_seconds(one: TrainerPlan) -> dict[str, float]:
    """Return the seconds of one update by cause."""
    time = one.training
    found = {name: getattr(time, name) for name in CAUSES if name != "ragged_s"}
    return found | {"ragged_s": (one.slowdown - 1) * time.total_s}


def plan_to_dict(plan: Plan, top: int) -> dict[str, Any]:
    """Return the whole plan as a dict, with the `top` best layouts."""
    return {
        "model": plan.config.policy.model,
        "gpu": plan.gpu.name,
        "usable_bytes": plan.gpu.memory_bytes * USABLE,
        "gpus": plan.gpus,
        "settings": overrides(plan),
        "workload": asdict(plan.workload) | {"tokens": plan.workload.tokens},
        "step_s": plan.step_s,
        "fits": not plan.faults,
        "faults": plan.faults,
        "phases": [_phase_to_dict(phase) for phase in plan.phases],
        "host_bytes_per_rank": _memory_to_dict(plan.host),
        "routed_experts_bytes": plan.routed_experts,
        "ref_policy": plan.ref_policy,
        "trainer": trainer_to_dict(plan.trainer),
        "ranking": _ranking_to_dict(plan.ranking, top),
        "allocations": [_allocation_to_dict(one) for one in plan.allocations[:top]],
        "syncs": {kind: _sync_to_dict(sync) for kind, sync in plan.syncs.items()},
        "notes": plan.notes,
    }


def trainer_to_dict(one: TrainerPlan) -> dict[str, Any]:
    """Return a trainer's layout, memory by kind on the fullest rank and by pipeline stage, and its seconds of a
    step.
    """
    seconds = update_seconds(one)
    return {
        "layout": one.layout.model_dump(mode="json"),
        "precision": one.policy.precision.model_dump(mode="json"),
        "recompute": one.policy.recompute,
        "memory": _memory_to_dict(one.memory),
        "stages": [_memory_to_dict(memory) for memory in one.stages],
        "step_s": one.seconds,
        "updates": one.updates,
        "update_s": seconds | {"total_s": sum(seconds.values())},
        "tokens_per_s_per_gpu": one.tokens_per_s_per_gpu,
        "mfu": one.mfu,
        "peak": one.training.peak_name,
    }


def _ranking_to_dict(ranking: Ranking | None, top: int) -> dict[str, Any]:
    if ranking is None:
        return {"layouts": []}
    counts = {name: getattr(ranking, name) for name in ("candidates", "fit_without_recompute", "fit_with_recompute")}
    return counts | {"layouts": [trainer_to_dict(one) for one in ranking.layouts[:top]]}


def _allocation_to_dict(one: GpuAllocation) -> dict[str, Any]:
    return {
        "gpus": one.gpus,
        "servers": one.servers,
        "layout": one.trainer.layout.model_dump(mode="json"),
        "recompute": one.trainer.policy.recompute,
        "seconds": one.seconds,
        "step_s": one.step_s,
    }


def _sync_to_dict(sync: SyncPlan) -> dict[str, Any]:
    """Totals; what each rank and card has would be thousands of numbers."""
    return {
        "messages": sync.messages,
        "sending_ranks": len(sync.sent),
        "busiest_card_bytes": max(sync.over_network.values(), default=0),
        "bytes_beside_shard": max(sync.held[rank] - sync.shard[rank] for rank in sync.held),
        "seconds": sync.seconds,
    }


def _phase_to_dict(phase: Phase) -> dict[str, Any]:
    return asdict(phase) | {"memory": _memory_to_dict(phase.memory)}


def _memory_to_dict(memory: Memory | HostBytes) -> dict[str, float]:
    return {f.name: getattr(memory, f.name) for f in fields(memory)} | {"total": memory.total}
