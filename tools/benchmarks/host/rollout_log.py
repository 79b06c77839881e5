"""A step written to the rollout log, which must be complete before anything is learned from it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.host.station import Station
from benchmarks.host.workload import Workload
from exprl_megatron.runs.journal import Journal, SampledStep


def prepare(workload: Workload) -> Callable[[], object]:
    """Writes the step."""
    sampled = SampledStep(workload.groups, len(workload.groups))

    def write() -> None:
        with tempfile.TemporaryDirectory() as directory:
            Journal(Path(directory)).write("prime", 1, sampled)

    return write


STATION = Station("rollout log, write", blocks=True, prepare=prepare)
