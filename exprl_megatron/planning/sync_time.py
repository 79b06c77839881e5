"""Seconds of a run's weight syncs, from the message-level plans of sync_broadcast.py and sync_p2p.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.transport import TransportKind, choose_transport
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.planning.hardware import Gpu

if TYPE_CHECKING:
    from exprl_megatron.planning.sync_broadcast import SyncPlan

_MIB = 2**20
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class _SyncRequest:
    architecture: Architecture
    layout: Layout
    gpu: Gpu
    kind: TransportKind
    dtype: str
    bucket_bytes: int
    servers: int
    server_tp: int
    fp8: bool

    def plan(self) -> SyncPlan:
        """Return the plan of the whole sync."""
        # Imported here: they import torch, which most of the planner does without.
        from exprl_megatron.planning.sync_broadcast import plan_sync
        from exprl_megatron.planning.sync_p2p import plan_direct

        sent = (self.architecture, self.layout, self.dtype, self.bucket_bytes, self.gpu)
        if self.kind == "direct":
            return plan_direct(*sent, servers=self.servers, server_tp=self.server_tp)
        colocated = self.kind == "handles"
        return plan_sync(*sent, servers=self.servers, server_tp=self.server_tp, colocated=colocated, fp8=self.fp8)


def sync_seconds(config: RunConfig, architecture: Architecture, gpu: Gpu) -> float:
    """Return the seconds of one sync by the run's transport; a transport through files is planned as a broadcast."""
    return _seconds(_asked(config, architecture, gpu, choose_transport(config).kind))


def sync_plans(config: RunConfig, architecture: Architecture, gpu: Gpu) -> dict[TransportKind, SyncPlan]:
    """Return the plan of a sync by each transport that suits the run's placement, the run's own first."""
    chosen = choose_transport(config).kind
    asked = _asked(config, architecture, gpu, chosen)
    kinds: tuple[TransportKind, ...] = ("handles",) if config.placement.kind == "colocated" else ("direct", "broadcast")
    suited = sorted(kinds, key=lambda kind: kind != chosen)
    return {kind: replace(asked, kind=kind).plan() for kind in suited if kind != "direct" or not config.sync.fp8}


def _asked(config: RunConfig, architecture: Architecture, gpu: Gpu, kind: TransportKind) -> _SyncRequest:
    return _SyncRequest(
        architecture=architecture,
        layout=config.policy.layout,
        gpu=gpu,
        kind=kind,
        dtype=_DTYPES[config.policy.precision.dtype],
        bucket_bytes=int(config.sync.bucket_mb * _MIB),
        servers=config.server.count,
        server_tp=config.server.tp,
        fp8=config.sync.fp8,
    )


@cache
def _seconds(asked: _SyncRequest) -> float:
    if asked.kind != "direct":
        return asked.plan().seconds
    from exprl_megatron.planning.sync_p2p import direct_seconds

    return direct_seconds(
        asked.architecture,
        asked.layout,
        asked.dtype,
        asked.bucket_bytes,
        asked.gpu,
        servers=asked.servers,
        server_tp=asked.server_tp,
    )
