"""Processes under the test backend with NCCL's behavior (tests/nccl_backend): their environment and their records."""

import os
from pathlib import Path

from exprl_megatron.utils.accelerator import GROUP_BACKEND

BACKEND = Path(__file__).parents[1] / "nccl_backend"
PATIENCE_S = 25.0
"""A process that would hang under NCCL raises after so long, and says where."""


def knows_backend(records: Path, patience_s: float = PATIENCE_S) -> dict[str, str]:
    """Return the environment of a process that can use the backend, as a server that is configured to; it records in
    `records`."""
    path = os.pathsep.join(part for part in (str(BACKEND), os.environ.get("PYTHONPATH")) if part)
    return {"PYTHONPATH": path, "NCCL_LIKE_RECORDS": str(records), "NCCL_LIKE_PATIENCE_S": str(patience_s)}


def uses_backend(records: Path, patience_s: float = PATIENCE_S) -> dict[str, str]:
    """Return the environment of a trainer's process that uses the backend where it would use NCCL on CUDA."""
    return knows_backend(records, patience_s) | {GROUP_BACKEND: "nccl_like"}


def faults(records: Path) -> list[str]:
    """Return what NCCL would not have borne, and objects of ours that were sent over a group of it."""
    from nccl_like.records import read_records

    return [
        f"{one['kind']}: {one['text']}"
        for one in read_records(records)
        if one["kind"] not in ("connected", "object") or "/exprl_megatron/" in one["text"]
    ]


def connected(records: Path) -> list[str]:
    """Return the groups that went over the backend, as often as they have members."""
    from nccl_like.records import read_records

    return [one["text"] for one in read_records(records, "connected")]
