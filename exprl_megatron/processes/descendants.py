"""The processes below a process, by the kernel's own lists.

psutil's `children` compares start times by the system clock, and misses children while that is adjusted.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil


def child_pids(pid: int) -> list[int]:
    """Return the ids of the processes that `pid` has started and that have not been waited for; [] where it ended."""
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread may end meanwhile.
        with suppress(OSError):
            found += map(int, tasks.read_text().split())
    return found


def descendants(pid: int) -> Iterator[int]:
    """Yield the ids of all processes below `pid`, each behind its parent."""
    for child in child_pids(pid):
        yield child
        yield from descendants(child)


def existing(pids: Iterable[int]) -> list[psutil.Process]:
    """Return the processes of `pids` that have not ended."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found
