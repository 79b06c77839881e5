"""Which rectangles of which Hugging Face tensors each trainer rank has in its parameters, as one table.

Parameters that are cut alike, as all experts are, are worked out once and repeated. Pure arithmetic, as in messages.py.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Parameter, Rule, hf_shapes, parameters
from exprl_megatron.models.shards import Shape, copies, holders, in_words, shard_shape

SHARE = np.dtype(
    [(field, np.int32) for field in ("tensor", "row", "rows", "column", "columns", "holding", "parameter", "local_row")]
)
"""A rectangle of a tensor (a vector counts as one column), the holding and the parameter that it is in, and its first
row there. The parameter's rows are as long as the rectangle's."""


@dataclass(frozen=True)
class Held:
    """All trainer ranks' shares of all exported tensors."""

    tensors: tuple[str, ...]
    """Hugging Face names, by the numbers in the table."""
    parameters: tuple[Parameter, ...]
    """By the numbers in the table."""
    widths: np.ndarray
    """int32 [parameters]: length of a row of each on a rank."""
    holdings: tuple[range, ...]
    """Ranks that have the same shares, by the numbers in the table."""
    shares: np.ndarray
    """SHARE [shares], sorted by tensor."""
    starts: np.ndarray
    """int64 [tensors + 1]: where each tensor's shares begin, and the end of the last one's."""


def held_shares(architecture: Architecture, layout: Layout, grouped: bool = False, words: str | None = None) -> Held:
    """What makes up each exported Hugging Face tensor. `grouped` is as in names.parameters.

    `words`: the tensors' memory is seen as numbers of this dtype (see shards.in_words); None: as their own.
    """
    shapes = hf_shapes(architecture)
    if words is not None:
        shapes = in_words(shapes, words)
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
    shares = np.concatenate([_repeated(table[rows[0][0]], rows, shapes, layout) for rows in alike.values()])
    shares = shares[np.argsort(shares["tensor"], kind="stable")]
    widths = np.empty(len(table), dtype=np.int32)
    for rows in alike.values():
        widths[[number for number, _, _ in rows]] = (*shard_shape(table[rows[0][0]], shapes, layout), 1)[1]
    starts = np.searchsorted(shares["tensor"], np.arange(len(shapes) + 1))
    merged, same = _merged(holdings)
    shares["holding"] = same[shares["holding"]]
    return Held(tuple(shapes), table, widths, merged, shares, starts)


def _repeated(
    first: Parameter, rows: list[tuple[int, list[int], np.ndarray]], shapes: dict[str, Shape], layout: Layout
) -> np.ndarray:
    """SHARE of parameters cut as `first` is; of each its number, its tensors' and the holdings of its shards."""
    pattern = np.array(list(_pattern(first, shapes, layout)), dtype=np.int32)
    tensors = np.array([tensors for _, tensors, _ in rows], dtype=np.int32)
    found = np.empty((len(rows), len(pattern)), dtype=SHARE)
    found["tensor"] = tensors[:, pattern[:, 0]]
    found["holding"] = np.stack([place for _, _, place in rows])[:, pattern[:, 1]]
    found["parameter"] = np.array([number for number, _, _ in rows])[:, None]
    for column, field in enumerate(("row", "rows", "column", "columns", "local_row"), start=2):
        found[field] = pattern[:, column]
    return found.reshape(-1)


def _pattern(parameter: Parameter, shapes: dict[str, Shape], layout: Layout) -> Iterable[tuple[int, ...]]:
    """(which of its tensors, which shard, row, rows, column, columns, local row) of each of its rectangles."""
    parts = len(holders(parameter, layout))
    dim = parameter.rule.split_dim
    runs_of = _runs(parameter.rule, shard_shape(parameter, shapes, layout)[0])
    for which, (name, (count, runs)) in enumerate(zip(parameter.hf_names, runs_of, strict=True)):
        height, width = (*shapes[name], 1)[:2]
        columns = width // parts if dim == 1 else width
        for index in range(parts):
            first = index * count if dim == 0 else 0
            # The last rows of a vocabulary may be padding.
            for start, length, local_row in runs:
                length = min(length, height - first - start)
                if length > 0:
                    yield which, index, first + start, length, index * columns if dim == 1 else 0, columns, local_row


@lru_cache(maxsize=64)
def _runs(rule: Rule, rows: int) -> tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]:
    """Of a parameter of so many rows, for each part how many rows it has, and where they are in the parameter.

    That is (row of the part, length, row of the parameter) of each stretch of rows that follow one another in both.
    """
    found = []
    # Rules move whole rows: where they put the rows' numbers is where rows go.
    for part in rule.parts(torch.arange(rows)[:, None]):
        at = part[:, 0].numpy()
        starts = np.append(0, np.flatnonzero(np.diff(at) != 1) + 1)
        ends = np.append(starts[1:], len(at))
        found.append((len(at), tuple(zip(starts.tolist(), (ends - starts).tolist(), at[starts].tolist(), strict=True))))
    return tuple(found)


def _merged(holdings: list[range]) -> tuple[tuple[range, ...], np.ndarray]:
    """Each holding once, and by which number those of `holdings` are then called."""
    numbers: dict[range, int] = {}
    same = np.array([numbers.setdefault(holding, len(numbers)) for holding in holdings], dtype=np.int32)
    return tuple(numbers), same
