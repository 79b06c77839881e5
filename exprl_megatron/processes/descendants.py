"""The processes below a process, by the kernel's own lists.

psutil's `children` compares start times by the system clock, and misses children while that is adjusted.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


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
