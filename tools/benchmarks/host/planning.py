"""The plan of micro-batches, packed, for one data-parallel rank: the dearest case."""

from collections.abc import Callable

from benchmarks.host.station import Station
from benchmarks.host.workload import Workload
from exprl_megatron.policy.packing import PackingShape, plan_micro_batches

SHAPE = PackingShape(packed=True, sequence=4, row=256, cp=2)
"""That of a 70B model with cp 2 on GPUs."""


def prepare(workload: Workload) -> Callable[[], object]:
    """Plans the step once, as a step does."""
    lengths = [len(sequence) for sequence in workload.sequences]
    work = [length * (1 + length / 1e5) for length in lengths]
    return lambda: plan_micro_batches(lengths, 1, workload.budget, SHAPE, group=5, work=work)


STATION = Station("plan of micro-batches", blocks=True, prepare=prepare)
