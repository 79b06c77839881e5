"""From sequences to the tensors of every micro-batch, twice: for log-probs and for the gradient."""

from collections.abc import Callable

import torch

from benchmarks.host.planning import SHAPE
from benchmarks.host.station import Station
from benchmarks.host.workload import Workload
from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.packing import plan_micro_batches
from exprl_megatron.policy.step import MicroBatches
from exprl_megatron.policy.world import World


def prepare(workload: Workload) -> Callable[[], object]:
    """Return one data-parallel rank's micro-batches, each dropped when the next one is made."""
    world = World(Layout(cp=2), torch.device("cpu"), rank=0, tp_rank=0, pp_rank=0, dp_rank=0)
    sequences = workload.sequences
    plan = plan_micro_batches([len(sequence) for sequence in sequences], 1, workload.budget, SHAPE)

    def passes() -> None:
        for _ in range(2):
            for _ in MicroBatches(sequences, plan, SHAPE, world):
                pass

    return passes


STATION = Station("sequences to tensors, two passes", blocks=True, prepare=prepare)
