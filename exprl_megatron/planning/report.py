"""A plan as tables for people and as JSON for machines."""

from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from exprl_megatron.config.policy import Layout
from exprl_megatron.planning.hardware import GIB
from exprl_megatron.planning.layouts import Learning
from exprl_megatron.planning.memory import USABLE, Memory
from exprl_megatron.planning.plan import Phase, Plan

KINDS = {
    "weights": "weights",
    "fp8_copies": "fp8 copies",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "kv_cache": "KV cache",
    "buffers": "buffers",
}
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
}


def layout_text(layout: Layout) -> str:
    """Only what is not 1, for example `TP4 PP4 VPP5 CP2 DP2`."""
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    text = " ".join(f"{name.upper()}{size}" for name, size in sizes.items() if size > 1) or "one GPU"
    return text + (" +ends" if layout.embedding_as_layer or layout.head_as_layer else "")


def print_plan(plan: Plan, console: Console) -> None:
    """Everything, the verdict first."""
    work, policy = plan.workload, plan.learning.policy
    held = ", ".join(f"{count} for the {kind}" for kind, count in plan.gpus.items())
    lines = [
        f"{plan.model}, {policy.precision.kind}, {sum(plan.gpus.values())} {plan.gpu.name}: {held}",
        f"layout {layout_text(policy.layout)}, recompute {policy.recompute}, "
        f"micro-batches of {policy.micro_batch_tokens:,} tokens",
        f"a step of {work.stage}: {work.problems} problems x {work.traces} traces, {work.prompt_tokens:.0f} + "
        f"{work.response_tokens:.0f} tokens each, {work.tokens / 1e6:.2f} M tokens, {work.updates} update(s)",
        f"{plan.step_s:.1f} s a step" if not plan.faults else "does not fit:",
        *plan.faults,
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    console.print(_causes_table(plan.learning))
    if plan.starting_policy:
        for line in _start_lines(plan):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if plan.ranking:
        console.print(ranking_table(plan.ranking))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def ranking_table(ranking: list[Learning]) -> Table:
    """Layouts side by side."""
    table = Table("layout", "recompute", "GiB", "step s", "tok/s/GPU", "MFU", "bubble", title="layouts of the trainer")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in ranking:
        time = one.training
        table.add_row(
            layout_text(one.layout),
            one.policy.recompute,
            f"{one.memory.total / GIB:.1f}",
            f"{one.seconds:.1f}",
            f"{time.tokens_per_s_per_gpu:,.0f}",
            f"{time.mfu:.1%}",
            f"{time.pp_s / time.total_s:.1%}",
        )
    table.caption = f"MFU of {ranking[0].training.peak_name}; steps of full sequences, log-probs included"
    return table


def _memory_table(plan: Plan) -> Table:
    present = [kind for kind in KINDS if any(getattr(phase.memory, kind) for phase in plan.phases)]
    room = plan.gpu.memory_bytes * USABLE / GIB
    table = Table("phase", "device", *(KINDS[kind] for kind in present), "total", title="GiB on the fullest device")
    for column in table.columns[2:]:
        column.justify = "right"
    for phase in plan.phases:
        values = [f"{getattr(phase.memory, kind) / GIB:.1f}" for kind in present]
        table.add_row(phase.name, phase.device, *values, f"{phase.memory.total / GIB:.1f}")
    table.caption = f"{room:.1f} of {plan.gpu.memory_bytes / GIB:.1f} GiB may be filled"
    return table


def _time_table(plan: Plan) -> Table:
    table = Table("phase", "seconds", "share", "tok/s/GPU", "MFU", title="a step")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in plan.phases:
        table.add_row(phase.name, f"{phase.seconds:.1f}", f"{phase.seconds / plan.step_s:.0%}", *_rates(phase))
    peaks = sorted({phase.peak for phase in plan.phases if phase.peak})
    table.caption = f"MFU of {', '.join(peaks)}; at full sequences" if peaks else None
    return table


def _rates(phase: Phase) -> tuple[str, str]:
    rate, mfu = phase.tokens_per_s_per_gpu, phase.mfu
    return "" if rate is None else f"{rate:,.0f}", "" if mfu is None else f"{mfu:.1%}"


def _causes_table(one: Learning) -> Table:
    table = Table("cause", "seconds", "share", title="one update by cause")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, words in CAUSES.items():
        seconds = getattr(one.training, name)
        if seconds:
            table.add_row(words, f"{seconds:.2f}", f"{seconds / one.training.total_s:.1%}")
    return table


def _start_lines(plan: Plan) -> list[str]:
    cost, chosen = plan.starting_policy, plan.learning.policy.starting_policy
    return [
        f"starting policy on the host: {cost['host_bytes_per_rank'] / GIB:.1f} GiB of host memory a rank (both sets of "
        f"weights while they change places), {cost['host_swap_s']:.2f} s of swapping a step"
        + (" (chosen)" if chosen == "host" else ""),
        f"starting policy on a server: {cost['server_weight_bytes_per_gpu'] / GIB:.1f} GiB of each of its GPUs, "
        f"{cost['server_score_s']:.1f} s of reading a step" + (" (chosen)" if chosen == "server" else ""),
    ]


def plan_record(plan: Plan) -> dict[str, Any]:
    """The plan in JSON's terms: bytes, seconds, tokens per second."""
    return {
        "model": plan.model,
        "gpu": plan.gpu.name,
        "usable_bytes": plan.gpu.memory_bytes * USABLE,
        "gpus": plan.gpus,
        "workload": asdict(plan.workload) | {"tokens": plan.workload.tokens},
        "step_s": plan.step_s,
        "fits": not plan.faults,
        "faults": plan.faults,
        "phases": [_phase_record(phase) for phase in plan.phases],
        "starting_policy": plan.starting_policy,
        "trainer": learning_record(plan.learning),
        "ranking": [learning_record(one) for one in plan.ranking],
        "notes": plan.notes,
    }


def learning_record(one: Learning) -> dict[str, Any]:
    """A trainer's layout, memory by kind, and seconds of one update by cause."""
    time = one.training
    return {
        "layout": one.layout.model_dump(mode="json"),
        "precision": one.policy.precision.model_dump(mode="json"),
        "recompute": one.policy.recompute,
        "memory": _memory_record(one.memory),
        "step_s": one.seconds,
        "update_s": {name: getattr(time, name) for name in CAUSES} | {"total_s": time.total_s},
        "tokens_per_s_per_gpu": time.tokens_per_s_per_gpu,
        "mfu": time.mfu,
        "peak": time.peak_name,
    }


def _phase_record(phase: Phase) -> dict[str, Any]:
    return asdict(phase) | {"memory": _memory_record(phase.memory)}


def _memory_record(memory: Memory) -> dict[str, float]:
    return {f.name: getattr(memory, f.name) for f in fields(memory)} | {"total": memory.total}
