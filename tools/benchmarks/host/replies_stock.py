"""From the bytes of the replies of servers without our plugins to arrays."""

from collections.abc import Callable

from benchmarks.host.replies import reading
from benchmarks.host.station import Station
from benchmarks.host.workload import Workload


def prepare(workload: Workload) -> Callable[[], object]:
    """Reads a reply for each trace, as SGLang itself writes it, and keeps what it says."""
    return reading(workload, flat=False)


STATION = Station("replies to arrays, without our plugins", blocks=False, prepare=prepare)
