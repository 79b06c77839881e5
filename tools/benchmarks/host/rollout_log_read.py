"""A step read from the rollout log, as a resumed run does."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.host.station import Station
from benchmarks.host.workload import Workload
from exprl_megatron.runs.journal import Journal, SampledStep


def prepare(workload: Workload) -> Callable[[], object]:
    """Reads the step."""
    directory = tempfile.TemporaryDirectory()
    journal = Journal(Path(directory.name))
    journal.write("prime", 1, SampledStep(workload.groups, len(workload.groups)))

    def read() -> SampledStep:
        with directory:
            return journal.read("prime", 1)

    return read


STATION = Station("rollout log, read on resume", blocks=False, prepare=prepare)
