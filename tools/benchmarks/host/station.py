"""What a station of the host's data path is, and how one is measured."""

import gc
import importlib
import pkgutil
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import benchmarks.host as host
from benchmarks.host.workload import Workload


@dataclass(frozen=True)
class Station:
    """A part of the data path."""

    name: str
    blocks: bool
    """Whether the trainer waits for it."""
    prepare: Callable[[Workload], Callable[[], object]]
    """Makes the inputs, which are not measured, and returns the work, which is."""


@dataclass(frozen=True)
class Cost:
    """What a station took for one workload."""

    station: str
    traces: int
    mean_tokens: int
    tokens: int
    """Of all responses."""
    cpu_s: float
    kernel_s: float
    """Of `cpu_s`, in the kernel: mostly for pages of memory that the process uses for the first time."""
    peak_mb: float
    """Above what the inputs hold."""


def stations() -> dict[str, Station]:
    """Return every station of this package, by name, in the order of their modules."""
    modules = (
        importlib.import_module(f"{host.__name__}.{found.name}") for found in pkgutil.iter_modules(host.__path__)
    )
    return {module.STATION.name: module.STATION for module in modules if hasattr(module, "STATION")}


def measured(name: str, workload: Workload) -> Cost:
    """Return the cost of the station `name` for a step of that size, in a process of its own."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(_measure, (name, workload))


def _measure(name: str, workload: Workload) -> Cost:
    return measure(stations()[name], workload)


def measure(station: Station, workload: Workload) -> Cost:
    """Return the station's cost for `workload`, in this process, which should do nothing else.

    The work is done for a small workload before, so that imports and first calls do not count.
    """
    station.prepare(replace(workload, traces=16, mean_tokens=64))()
    work = station.prepare(workload)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, in_kernel, started = memory("VmRSS"), _kernel_s(), time.process_time()
    result = work()
    seconds, in_kernel = time.process_time() - started, _kernel_s() - in_kernel
    grown = memory("VmHWM") - before
    del result
    tokens = int(workload.lengths.sum())
    return Cost(station.name, workload.traces, workload.mean_tokens, tokens, seconds, in_kernel, grown / 1e6)


def _kernel_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def memory(field: str) -> int:
    """Return bytes of this process, by a field of Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
