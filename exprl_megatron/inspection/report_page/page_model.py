"""The data of a page about one or several runs, as JSON types."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exprl_megatron.inspection.report_page.page_blocks import PageBlock, SizeBudget, evenly_spaced
from exprl_megatron.inspection.report_page.page_json import embedded
from exprl_megatron.inspection.report_page.run_figures import config_rows, run_names
from exprl_megatron.inspection.report_page.run_pages import RunPages

_PLACE_BYTES = 4000
"""About what the figures of one step, and the index of its traces, take in the tree."""
_MOST_POINTS = 2000
"""Steps of all runs together that have points in the curves; more are sampled evenly."""


@dataclass(frozen=True)
class PageModel:
    """The data of a page: `tree` is drawn immediately, the blocks of traces when they are opened."""

    tree: dict[str, Any]
    """{made, references, runs, config}; a place of a run names its block by its key."""
    blocks: dict[str, PageBlock]
    """By key."""


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return what tells two states of a file apart: several writes may come within one tick of the kernel's clock."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class PageReader:
    """Reads runs, for one page or again and again for a page that is served.

    Raises UserError where one of the directories holds no run.
    """

    def __init__(self, roots: Sequence[Path], references: bool):
        self._references = references
        names = run_names(roots)
        self._runs = [RunPages(root, name, references) for root, name in zip(roots, names, strict=True)]

    def stamp(self) -> tuple:
        """Return a value that differs where a run has written something new."""
        found = []
        for run in self._runs:
            directory = run.directory
            for path in (directory.metrics, directory.timeline, directory.record, directory.evaluations):
                found.append(_size_and_time(path) if path.exists() else (0, 0))
            found += [_size_and_time(path) for path in sorted(directory.journal.glob("*"))]
        return tuple(found)

    def model(self, page_bytes: int) -> PageModel:
        """Return the page of what the runs have left so far, of about `page_bytes` as far as they are for traces."""
        runs = [run.figures() for run in self._runs]
        _thin_out(runs)
        for pages, run in zip(self._runs, runs, strict=True):
            run["predicted"] = pages.predictions()
        tree = {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "references": self._references,
            "runs": runs,
            "config": config_rows([run.config for run in self._runs], not self._references),
        }
        places = [run.places() for run in self._runs]
        count = sum(len(of_run) for of_run, _ in places)
        room = SizeBudget(page_bytes - len(embedded(tree)) - _PLACE_BYTES * count, count)
        blocks: dict[str, PageBlock] = {}
        for pages, run, (of_run, steps) in zip(self._runs, runs, places, strict=True):
            run["logged_steps"], run["places"] = steps, []
            for what, block in pages.read(of_run, room.share):
                run["places"].append(what | ({"block": block.key} if block.packed else {}))
                if block.packed:
                    blocks[block.key] = block
                room.spend(block)
        return PageModel(tree, blocks)


def _thin_out(runs: Sequence[dict[str, Any]]) -> None:
    """Leave at most _MOST_POINTS steps in the curves of all runs together, and say so."""
    most = max(100, _MOST_POINTS // len(runs))
    for run in runs:
        of_run = run["curves"]
        count = len(of_run["steps"])
        if count > most:
            kept = evenly_spaced(range(count), most)
            for name in ("steps", "stages", "wall"):
                of_run[name] = [of_run[name][index] for index in kept]
            of_run["metrics"] = {name: [v[index] for index in kept] for name, v in of_run["metrics"].items()}
            of_run["of"] = count
