"""The traces of one step whose texts fit into a page's limit of bytes, in their packed form."""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exprl_megatron.inspection.report_page.page_json import compact, packed
from exprl_megatron.inspection.report_page.trace_records import TraceRecords
from exprl_megatron.inspection.rollout_steps import InspectedGroup
from exprl_megatron.inspection.selection import disagreement, has_abstention, score_spread

_LARGEST_SHARE = 0.25
"""Of a step's bytes that one group may take while others wait."""


@dataclass(frozen=True)
class PageBlock:
    """The traces of one step, or of one evaluation, that a page shows."""

    index: dict[str, Any]
    """{traces, kept, groups, problems: of the groups in the page}: what the page reads before the block is opened."""
    packed: str
    """{groups: [{..., traces: [rows with texts]}]} as JSON, deflated by gzip, in base64."""

    @property
    def key(self) -> str:
        """The block's name, by its content: a window never gets another step's traces under it."""
        return hashlib.sha256(self.packed.encode()).hexdigest()[:16]


class SizeBudget:
    """The bytes of a page for its blocks; what one block does not use is shared by those after it."""

    def __init__(self, total: int, blocks: int):
        self._left, self._waiting = total, blocks

    def share(self) -> int:
        """Return the bytes that the next block may take."""
        return max(0, self._left) // max(1, self._waiting)

    def spend(self, block: PageBlock) -> None:
        """Count a block that was made."""
        self._left -= len(block.packed)
        self._waiting -= 1


def pack(groups: Sequence[InspectedGroup], records: TraceRecords, most: int) -> PageBlock:
    """Return the traces of a step that fit into about `most` bytes of a page.

    What fails to agree with the verifier comes first, then what has no score, then the widest groups; within a group
    likewise, then its best, its worst, and the others. A group of which a trace is in the page has the figures of all.
    """
    kept = _fitting(groups, records, most)
    found = []
    for position, inspected in enumerate(groups):
        if position in kept:
            rows = [records.row(inspected, place) for place in range(len(inspected.group.samples))]
            for place, texts in kept[position].items():
                rows[place]["texts"] = texts
            found.append(records.group(inspected) | {"traces": rows})
    index = {
        "traces": sum(len(inspected.group.samples) for inspected in groups),
        "kept": sum(map(len, kept.values())),
        "groups": len(groups),
        "problems": [record["problem"] for record in found],
    }
    return PageBlock(index, packed({"groups": found}))


def _fitting(groups: Sequence[InspectedGroup], records: TraceRecords, most: int) -> dict[int, dict[int, dict]]:
    """Return, by the position of each group, the texts of its traces that fit, by their places."""
    order = sorted(range(len(groups)), key=lambda position: _interest(groups[position]), reverse=True)
    meter = _Meter(most)
    kept: dict[int, dict[int, dict]] = {}
    postponed: list[tuple[int, list[int]]] = []
    for position in order:
        places, used = _places(groups[position]), 0
        opening = meter.cost(records.group(groups[position]))
        for number, place in enumerate(places):
            texts = records.texts(groups[position], place)
            cost = meter.cost(texts)
            if used and used + cost > _LARGEST_SHARE * most:
                postponed.append((position, places[number:]))
                break
            if not meter.take(cost + (0 if used else opening)):
                return kept
            used += cost
            kept.setdefault(position, {})[place] = texts
    for position, places in postponed:
        for place in places:
            texts = records.texts(groups[position], place)
            if not meter.take(meter.cost(texts)):
                return kept
            kept[position][place] = texts
    return kept


class _Meter:
    """How many bytes of a page records take; what was written before makes the next one shorter."""

    def __init__(self, most: int):
        self._left = most
        self._stream = zlib.compressobj(6)

    def cost(self, record: dict[str, Any]) -> int:
        """Return the bytes in base64 that `record` adds."""
        data = self._stream.compress(compact(record)) + self._stream.flush(zlib.Z_SYNC_FLUSH)
        return len(data) * 4 // 3

    def take(self, cost: int) -> bool:
        """Spend the bytes if as many are left; returns whether they were."""
        if cost > self._left:
            return False
        self._left -= cost
        return True


def _interest(inspected: InspectedGroup) -> tuple[float, int, float]:
    samples = inspected.group.samples
    largest = max((found for sample in samples if (found := disagreement(sample)) is not None), default=0.0)
    return largest, sum(map(has_abstention, samples)), score_spread(inspected.group) or 0.0


def _places(inspected: InspectedGroup) -> list[int]:
    """Return the places of a group's traces, the most interesting first."""
    samples = inspected.group.samples
    scored = [(sample.score, place) for place, sample in enumerate(samples) if sample.score is not None]
    ends = {max(scored)[1], min(scored)[1]} if scored else set()

    def key(place: int) -> tuple:
        sample = samples[place]
        return -(disagreement(sample) or 0.0), not has_abstention(sample), place not in ends, place

    return sorted(range(len(samples)), key=key)


def evenly_spaced(items: Sequence, count: int) -> list:
    """Return at most `count` of `items`, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    last = len(items) - 1
    return [items[round(number * last / (count - 1))] for number in range(count)]
