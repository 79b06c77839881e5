"""The message with a rank's sequences, made on rank 0 and read by a rank that learns from all of them."""

import pickle
from collections.abc import Callable

from benchmarks.host.station import Station
from benchmarks.host.workload import Workload


def prepare(workload: Workload) -> Callable[[], object]:
    """As torch.distributed makes and reads objects; what the network takes is not measured."""
    sequences = workload.sequences
    return lambda: pickle.loads(pickle.dumps(sequences))


STATION = Station("sequences to another rank", blocks=True, prepare=prepare)
