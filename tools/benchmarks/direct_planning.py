"""What planning a `direct` sync costs a trainer rank at full size: arithmetic on a model's shapes, without weights."""

import gc
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.host.station import memory
from exprl_megatron import planning
from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture, read_architecture
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.serving.sharding import server_needs
from exprl_megatron.serving.transfer_tables import needs_table, pack_needs, pack_transfers, unpack_needs
from exprl_megatron.weight_sync.p2p_schedule import TransferPlan
from exprl_megatron.weight_sync.shard_table import shard_table

_BUCKET_BYTES = 2**28


@dataclass(frozen=True)
class Case:
    """A trainer and its servers."""

    model: str
    layout: Layout
    servers: int
    server_tp: int


CASES = (
    Case("llama-3.3-70b", Layout(tp=4, pp=4, vpp=10, cp=2, dp=2), 6, 8),
    Case("llama-3.3-70b", Layout(tp=4, pp=5, dp=8), 8, 8),
    Case(
        "qwen3-235b-a22b",
        Layout(pp=8, vpp=6, cp=2, ep=8, dp=4, embedding_as_layer=True, head_as_layer=True),
        6,
        8,
    ),
)


@dataclass(frozen=True)
class PlanCost:
    """Of one rank, from what servers reported to what it sends; on rank 0 to what each server's rank is sent, too."""

    rank: int
    sent: int
    """Messages that the rank sends in a sync."""
    cpu_s: float
    peak_mb: float
    """Above what the inputs hold."""
    reported_kb: float
    """What a server rank reports, on average."""
    orders_kb: float
    """What a server rank is sent, on average; 0 on other ranks than 0."""


def measured(case: Case, rank: int) -> PlanCost:
    """Return the cost on trainer rank `rank`, in a process of its own."""
    # Memory that the inputs' making leaves free would hide what the plan takes: that is another process.
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        packed = pool.apply(_reported, (case,))
        return pool.apply(_measure, (case, rank, packed))


def _reported(case: Case) -> list[bytes]:
    """Return what the ranks of one server report."""
    architecture = _architecture(case)
    shapes = hf_shapes(architecture)
    ranks = server_needs(shapes, case.server_tp, architecture.kv_groups)
    return [pack_needs(needs_table(needs, list(shapes))) for needs in ranks]


def _architecture(case: Case) -> Architecture:
    return read_architecture(Path(planning.__file__).parent / "architectures" / case.model)


def _measure(case: Case, rank: int, packed: list[bytes]) -> PlanCost:
    architecture = _architecture(case)
    shapes = hf_shapes(architecture)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory("VmRSS"), time.process_time()
    needs = [[unpack_needs(table, shapes) for table in packed]] * case.servers
    held = shard_table(architecture, case.layout)
    plan = TransferPlan(needs, held, case.layout, "bfloat16", _BUCKET_BYTES)
    sends = plan.sends(rank)
    orders = [pack_transfers(plan.receives(target)) for target in plan.targets] if rank == 0 else []
    seconds = time.process_time() - started
    peak = memory("VmHWM") - before
    return PlanCost(
        rank,
        len(sends.messages),
        seconds,
        peak / 1e6,
        sum(map(len, packed)) / len(packed) / 1e3,
        sum(map(len, orders)) / len(orders) / 1e3 if orders else 0.0,
    )
