"""A table of the trainer's shards: which rectangles of which Hugging Face tensors each rank has in its parameters.

Parameters that are cut identically, such as all experts, are computed once and repeated. Pure arithmetic, as in
messages.py.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Parameter, hf_shapes, parameters
from exprl_megatron.models.rules import Rule, spans
from exprl_megatron.models.shards import Shape, copies, holders, shapes_in_words, shard_shape

SHARD = np.dtype(
    [(field, np.int32) for field in ("tensor", "row", "rows", "column", "columns", "holding", "parameter", "local_row")]
)
"""A rectangle of a tensor (a vector counts as one column), its holding, its parameter, and its first row in the
parameter, whose rows are as long as the rectangle's."""


@dataclass(frozen=True)
class ShardTable:
    """All trainer ranks' shards of all exported tensors, as arrays."""

    tensors: tuple[str, ...]
    """Hugging Face names, indexed by the numbers in the table."""
    parameters: tuple[Parameter, ...]
    """By the numbers in the table."""
    widths: np.ndarray
    """int32 [parameters]: length of a row of each on a rank."""
    holdings: tuple[range, ...]
    """Ranks that have the same shards (data-parallel copies), indexed by the numbers in the table."""
    shards: np.ndarray
    """SHARD [shards], sorted by tensor."""
    starts: np.ndarray
    """int64 [tensors + 1]: the first row of each tensor's shards, and the end of the last one's."""


def shard_table(
    architecture: Architecture, layout: Layout, grouped: bool = False, words: str | None = None
) -> ShardTable:
    """Build the table for a model and a layout. `grouped` is as in name_map.parameters.

    `words`: view the tensors' memory as elements of this dtype (see shards.shapes_in_words); None: of their own dtype.
    """
    shapes = hf_shapes(architecture)
    if words is not None:
        shapes = shapes_in_words(shapes, words)
    numbers = {name: number for number, name in enumerate(shapes)}
    table = tuple(parameter for parameter in parameters(architecture, layout, grouped) if parameter.exported)
    places: dict[tuple, np.ndarray] = {}
    holdings: list[range] = []
    alike: dict[tuple, list[tuple[int, list[int], np.ndarray]]] = defaultdict(list)
    for number, parameter in enumerate(table):
        cut = parameter.rule.split_dim is not None
        place = (parameter.pp_rank, parameter.ep_rank, cut)
        if place not in places:
            ranges = [copies(parameter, rank, layout) for rank in holders(parameter, layout)]
            places[place] = np.arange(len(holdings), len(holdings) + len(ranges))
            holdings += ranges
        key = (parameter.rule, tuple(shapes[name] for name in parameter.hf_names), len(places[place]))
        alike[key].append((number, [numbers[name] for name in parameter.hf_names], places[place]))
    shards = np.concatenate([_repeated(table[rows[0][0]], rows, shapes, layout) for rows in alike.values()])
    shards = shards[np.argsort(shards["tensor"], kind="stable")]
    widths = np.empty(len(table), dtype=np.int32)
    for rows in alike.values():
        widths[[number for number, _, _ in rows]] = math.prod(shard_shape(table[rows[0][0]], shapes, layout)[1:])
    starts = np.searchsorted(shards["tensor"], np.arange(len(shapes) + 1))
    merged, same = _merged(holdings)
    shards["holding"] = same[shards["holding"]]
    return ShardTable(tuple(shapes), table, widths, merged, shards, starts)


def _repeated(
    first: Parameter, rows: list[tuple[int, list[int], np.ndarray]], shapes: dict[str, Shape], layout: Layout
) -> np.ndarray:
    """Return SHARD rows of parameters that are cut as `first` is; `rows` has each one's number, tensors and
    holdings.
    """
    pattern = np.array(list(_pattern(first, shapes, layout)), dtype=np.int32)
    tensors = np.array([tensors for _, tensors, _ in rows], dtype=np.int32)
    found = np.empty((len(rows), len(pattern)), dtype=SHARD)
    found["tensor"] = tensors[:, pattern[:, 0]]
    found["holding"] = np.stack([place for _, _, place in rows])[:, pattern[:, 1]]
    found["parameter"] = np.array([number for number, _, _ in rows])[:, None]
    for column, field in enumerate(("row", "rows", "column", "columns", "local_row"), start=2):
        found[field] = pattern[:, column]
    return found.reshape(-1)


def _pattern(parameter: Parameter, shapes: dict[str, Shape], layout: Layout) -> Iterable[tuple[int, ...]]:
    """Yield (which of its tensors, which shard, row, rows, column, columns, local row) of each of its rectangles."""
    parts = len(holders(parameter, layout))
    dim = parameter.rule.split_dim
    runs_of = _runs(parameter.rule, shard_shape(parameter, shapes, layout)[0])
    for which, (name, (_, runs)) in enumerate(zip(parameter.hf_names, runs_of, strict=True)):
        height, width = shapes[name][0], math.prod(shapes[name][1:])
        columns = width // parts if dim == 1 else width
        for index in range(parts):
            held = spans(parameter.rule, which, height, index, parts) if dim == 0 else [(0, height)]
            for start, length, local_row in runs:
                for row, rows, skipped in _within(held, start, length):
                    yield which, index, row, rows, index * columns if dim == 1 else 0, columns, local_row + skipped


def _within(held: list[tuple[int, int]], start: int, length: int) -> Iterable[tuple[int, int, int]]:
    """Return the rows `start` on of a part, which has the spans `held` of a tensor: (first, rows, rows of the run
    before it).

    What is behind the spans is padding, as of a vocabulary's last part.
    """
    begin = 0
    for first, stop in held:
        low, high = max(start, begin), min(start + length, begin + stop - first)
        if low < high:
            yield first + low - begin, high - low, low - start
        begin += stop - first


@lru_cache(maxsize=64)
def _runs(rule: Rule, rows: int) -> tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]:
    """Return, for each part of a parameter with `rows` rows, its number of rows and their place in the parameter.

    Each run is (row of the part, length, row of the parameter), of rows that are contiguous in both.
    """
    found = []
    # Rules move whole rows, so applying one to row numbers shows where rows go.
    for part in rule.parts(np.arange(rows)[:, None]):
        at = part[:, 0]
        starts = np.append(0, np.flatnonzero(np.diff(at) != 1) + 1)
        ends = np.append(starts[1:], len(at))
        found.append((len(at), tuple(zip(starts.tolist(), (ends - starts).tolist(), at[starts].tolist(), strict=True))))
    return tuple(found)


def _merged(holdings: list[range]) -> tuple[tuple[range, ...], np.ndarray]:
    """Return the distinct holdings, and the index of each of `holdings` among them."""
    numbers: dict[range, int] = {}
    same = np.array([numbers.setdefault(holding, len(numbers)) for holding in holdings], dtype=np.int32)
    return tuple(numbers), same
