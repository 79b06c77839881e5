"""Converts a plan to JSON values: bytes, seconds, tokens per second."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from exprl_megatron.planning.layouts import Learning, Ranking
from exprl_megatron.planning.memory import USABLE, HostBytes, Memory
from exprl_megatron.planning.overrides import overrides
from exprl_megatron.planning.phases import Phase
from exprl_megatron.planning.plan import Division, Plan

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


def update_seconds(one: Learning) -> dict[str, float]:
    """Seconds of one update by cause."""
    time = one.training
    found = {name: getattr(time, name) for name in CAUSES if name != "ragged_s"}
    return found | {"ragged_s": (one.slowdown - 1) * time.total_s}


def plan_record(plan: Plan, top: int) -> dict[str, Any]:
    """All of the plan, with the `top` best layouts."""
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
        "phases": [_phase_record(phase) for phase in plan.phases],
        "host_bytes_per_rank": _memory_record(plan.host),
        "routed_experts_bytes": plan.routed_experts,
        "starting_policy": plan.ref_policy,
        "trainer": learning_record(plan.learning),
        "ranking": _ranking_record(plan.ranking, top),
        "divisions": [_division_record(one) for one in plan.divisions[:top]],
        "syncs": {kind: _sync_record(sync) for kind, sync in plan.syncs.items()},
        "notes": plan.notes,
    }


def learning_record(one: Learning) -> dict[str, Any]:
    """A trainer's layout, memory by kind on the fullest rank and by pipeline stage, and its seconds of a step."""
    seconds = update_seconds(one)
    return {
        "layout": one.layout.model_dump(mode="json"),
        "precision": one.policy.precision.model_dump(mode="json"),
        "recompute": one.policy.recompute,
        "memory": _memory_record(one.memory),
        "stages": [_memory_record(memory) for memory in one.stages],
        "step_s": one.seconds,
        "updates": one.updates,
        "update_s": seconds | {"total_s": sum(seconds.values())},
        "tokens_per_s_per_gpu": one.tokens_per_s_per_gpu,
        "mfu": one.mfu,
        "peak": one.training.peak_name,
    }


def _ranking_record(ranking: Ranking | None, top: int) -> dict[str, Any]:
    if ranking is None:
        return {"layouts": []}
    counts = {name: getattr(ranking, name) for name in ("looked_at", "plain", "recomputed")}
    return counts | {"layouts": [learning_record(one) for one in ranking.layouts[:top]]}


def _division_record(one: Division) -> dict[str, Any]:
    return {
        "gpus": one.gpus,
        "servers": one.servers,
        "layout": one.learning.layout.model_dump(mode="json"),
        "recompute": one.learning.policy.recompute,
        "seconds": one.seconds,
        "step_s": one.step_s,
    }


def _sync_record(sync: SyncPlan) -> dict[str, Any]:
    """Totals; what each rank and card has would be thousands of numbers."""
    return {
        "messages": sync.messages,
        "sending_ranks": len(sync.sent),
        "busiest_card_bytes": max(sync.over_network.values(), default=0),
        "bytes_beside_shard": max(sync.held[rank] - sync.shard[rank] for rank in sync.held),
        "seconds": sync.seconds,
    }


def _phase_record(phase: Phase) -> dict[str, Any]:
    return asdict(phase) | {"memory": _memory_record(phase.memory)}


def _memory_record(memory: Memory | HostBytes) -> dict[str, float]:
    return {f.name: getattr(memory, f.name) for f in fields(memory)} | {"total": memory.total}
