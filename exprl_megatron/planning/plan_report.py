"""Prints a plan as tables; plan_json.py writes it as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from exprl_megatron.planning.hardware import GB, GIB
from exprl_megatron.planning.layouts import Ranking, TrainerPlan
from exprl_megatron.planning.memory import USABLE, Memory
from exprl_megatron.planning.overrides import layout_text, overrides
from exprl_megatron.planning.phases import Phase
from exprl_megatron.planning.plan import GpuAllocation, Plan, allocation_of
from exprl_megatron.planning.plan_json import CAUSES, update_seconds
from exprl_megatron.reporting.fitted_table import print_table

if TYPE_CHECKING:
    from exprl_megatron.planning.sync_broadcast import SyncPlan

KINDS = {
    "weights": "weights",
    "fp8_copies": "fp8 copies",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "kv_cache": "KV cache",
    "communication": "comm.",
    "workspace": "work",
    "asleep": "asleep",
}
SUMS = {
    "sample, judge": ("sample", "judge"),
    "log-probs, train": ("ref log-probs", "log-probs", "train"),
    "reshard, save": ("reshard", "save"),
}
"""Columns of the table of allocations, and the phases that each one sums."""


SYNC_COLUMNS = (
    "transport",
    "messages",
    "sending ranks",
    "GB out of a trainer's card",
    "GB into a card",
    "GB of a shard",
    "GB of buffers",
    "seconds",
)


def print_plan(plan: Plan, console: Console, top: int) -> None:
    """Print the whole plan, the verdict first."""
    _print_lines(console, _headlines(plan))
    print_table(console, _memory_table(plan))
    if len(plan.trainer.stages) > 1:
        print_table(console, _stages_table(plan.trainer))
    print_table(console, _time_table(plan))
    print_table(console, _causes_table(plan.trainer))
    if plan.syncs:
        print_table(console, _syncs_table(plan))
    _print_lines(console, _host_lines(plan))
    if plan.ranking is not None:
        print_table(console, ranking_table(plan.ranking, top))
    if plan.allocations:
        print_table(console, _allocations_table(plan.allocations, top))
    _print_lines(console, [f"note: {note}" for note in plan.notes])


def _headlines(plan: Plan) -> list[str]:
    work, policy = plan.workload, plan.config.policy
    traces = f"{work.problems} problems x {work.traces} traces" if work.traces > 1 else f"{work.problems} sequences"
    return [
        f"{policy.model}, {policy.precision.kind}, {sum(plan.gpus.values())} {plan.gpu.name}: {_held(plan)}",
        f"layout {layout_text(policy.layout)}, recompute {policy.recompute}, "
        f"micro-batches of {policy.micro_batch_tokens:,} tokens",
        f"settings {' '.join(overrides(plan))}",
        f"a step of {work.stage}: {traces}, {work.prompt_tokens:.0f} + {work.response_tokens:.0f} tokens each, "
        f"{work.tokens / 1e6:.2f} M tokens, {work.updates} update(s)",
        f"{seconds_text(plan.step_s)} s a step" if not plan.faults else "does not fit:",
        *plan.faults,
    ]


def _held(plan: Plan) -> str:
    own = allocation_of(plan)
    return ", ".join(f"{gpus} train" if kind == "trainer" else _servers(own, kind) for kind, gpus in own.gpus.items())


def _servers(allocation: GpuAllocation, kind: str) -> str:
    size = allocation.servers[kind]
    return f"{allocation.gpus[kind] // size} {kind}(s) of {size}"


def _allocations_table(allocations: tuple[GpuAllocation, ...], top: int) -> Table:
    """Return the table of the `top` best allocations of the GPUs."""
    kinds = list(allocations[0].servers)
    table = Table("trainers", "layout", "recompute", *kinds, *SUMS, "step s", title="allocations of the GPUs")
    for column in table.columns[3:]:
        column.justify = "right"
    for one in allocations[:top]:
        counts = [f"{one.gpus[kind] // one.servers[kind]} of {one.servers[kind]}" for kind in kinds]
        sums = [sum(one.seconds.get(phase, 0.0) for phase in phases) for phases in SUMS.values()]
        layout, recompute = layout_text(one.trainer.layout), one.trainer.policy.recompute
        table.add_row(
            str(one.gpus["trainer"]), layout, recompute, *counts, *map(seconds_text, sums), seconds_text(one.step_s)
        )
    return table


def ranking_table(ranking: Ranking, top: int) -> Table:
    """Return the table of the `top` best layouts."""
    table = Table("layout", "recompute", "GiB", "step s", "tok/s/GPU", "MFU", "bubble", title="layouts of the trainer")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in ranking.layouts[:top]:
        time = one.training
        table.add_row(
            layout_text(one.layout),
            one.policy.recompute,
            f"{one.memory.total / GIB:.1f}",
            seconds_text(one.seconds),
            f"{one.tokens_per_s_per_gpu:,.0f}",
            f"{one.mfu:.1%}",
            f"{time.pp_s / time.total_s:.1%}",
        )
    table.caption = (
        f"of {ranking.candidates} legal layouts {ranking.fit_without_recompute} fit, "
        f"{ranking.fit_with_recompute} more with full recomputation; "
        "a step is log-probs and training"
    )
    return table


def _memory_table(plan: Plan) -> Table:
    room = plan.gpu.memory_bytes * USABLE / GIB
    table = _kinds_table(("phase", "device"), [phase.memory for phase in plan.phases], "GiB on the fullest device")
    for phase in plan.phases:
        table.add_row(phase.name, phase.device, *_kinds(phase.memory, table))
    filled = "; servers fill their devices" if len(plan.gpus) > 1 else ""
    table.caption = f"{room:.1f} of {plan.gpu.memory_bytes / GIB:.1f} GiB may be filled{filled}"
    return table


def _stages_table(one: TrainerPlan) -> Table:
    table = _kinds_table(("pipeline stage",), one.stages, "GiB of each rank while it trains")
    for stage, memory in enumerate(one.stages):
        table.add_row(str(stage), *_kinds(memory, table))
    return table


def _kinds_table(names: tuple[str, ...], memories, title: str) -> Table:
    present = [words for kind, words in KINDS.items() if any(getattr(memory, kind) for memory in memories)]
    table = Table(*names, *present, "total", title=title)
    for column in table.columns[len(names) :]:
        column.justify = "right"
    return table


def _kinds(memory: Memory, table: Table) -> list[str]:
    present = {column.header for column in table.columns}
    values = [getattr(memory, kind) for kind, words in KINDS.items() if words in present]
    return [f"{value / GIB:.1f}" if value else "" for value in [*values, memory.total]]


def _time_table(plan: Plan) -> Table:
    beside = any(phase.busy_s for phase in plan.phases)
    columns = ("phase", "seconds", "share", *(("works s",) if beside else ()), "tok/s/GPU", "MFU")
    table = Table(*columns, title="a step")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in plan.phases:
        works = (seconds_text(phase.busy_s or phase.seconds),) if beside else ()
        share = f"{phase.seconds / plan.step_s:.0%}"
        table.add_row(phase.name, seconds_text(phase.seconds), share, *works, *_rates(phase))
    peaks = sorted({phase.speed.peak for phase in plan.phases if phase.speed})
    table.caption = f"MFU of {', '.join(peaks)}"
    return table


def _rates(phase: Phase) -> tuple[str, str]:
    return (f"{phase.speed.tokens_per_s_per_gpu:,.0f}", f"{phase.speed.mfu:.1%}") if phase.speed else ("", "")


def _syncs_table(plan: Plan) -> Table:
    table = Table(*SYNC_COLUMNS, title="a weight sync by transport")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, sync in plan.syncs.items():
        table.add_row(*sync_cells(kind, sync))
    chosen = next(iter(plan.syncs))
    table.caption = f"{chosen}: the run's; cards: the busiest; buckets of {plan.config.sync.bucket_mb:g} MiB"
    return table


def sync_cells(kind: str, sync: SyncPlan) -> list[str]:
    """Return a row of that table; see SYNC_COLUMNS."""
    cards = sync.over_network.items()
    out = max((size for card, size in cards if card.startswith("trainer") and card.endswith(" out")), default=0)
    into = max((size for card, size in cards if card.endswith(" in")), default=0)
    buffers = max(sync.held[rank] - sync.shard[rank] for rank in sync.held)
    return [
        kind,
        f"{sync.messages:,}",
        str(len(sync.sent)),
        f"{out / GB:.1f}",
        f"{into / GB:.1f}",
        f"{max(sync.shard.values()) / GB:.1f}",
        f"{buffers / GB:.1f}",
        seconds_text(sync.seconds),
    ]


def _causes_table(one: TrainerPlan) -> Table:
    table = Table("cause", "seconds", "share", title="one update by cause")
    for column in table.columns[1:]:
        column.justify = "right"
    seconds = update_seconds(one)
    whole = sum(seconds.values())
    for name, value in seconds.items():
        if value:
            table.add_row(CAUSES[name], seconds_text(value), f"{value / whole:.1%}")
    return table


def _host_lines(plan: Plan) -> list[str]:
    lines = []
    if plan.host.optimizer:
        lines.append(f"optimizer on the host: {plan.host.optimizer / GIB:.1f} GiB of host memory a rank")
    if plan.host.asleep:
        lines.append(f"asleep while servers sample: {plan.host.asleep / GIB:.1f} GiB of pinned host memory a rank")
    if plan.routed_experts:
        lines.append(
            f"router replay: {plan.routed_experts / GIB:.1f} GiB of rank 0's host memory, the experts that servers "
            f"chose for a step's tokens"
        )
    if plan.ref_policy:
        cost, chosen = plan.ref_policy, plan.config.policy.ref_policy
        lines += [
            f"reference policy on the host: {cost['host_bytes_per_rank'] / GIB:.1f} GiB of host memory a rank (both "
            f"sets of weights while they change places), {seconds_text(cost['host_swap_s'])} s of swapping and "
            f"{seconds_text(cost['host_score_s'])} s of reading a step" + (" (chosen)" if chosen == "host" else ""),
            f"reference policy on a server: {cost['server_weight_bytes_per_gpu'] / GIB:.1f} GiB of each of its GPUs, "
            f"{seconds_text(cost['server_score_s'])} s of reading a step" + (" (chosen)" if chosen == "server" else ""),
        ]
    return lines


def seconds_text(seconds: float) -> str:
    """Format seconds: one decimal from 1 s on, two significant digits below."""
    return f"{seconds:.1f}" if seconds >= 1 or seconds == 0 else f"{seconds:.2g}"


def _print_lines(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
