"""How a Megatron parameter is made of Hugging Face tensors: merged on each rank, split, and joined again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Rule:
    """How a Megatron parameter is made of Hugging Face tensors: here, one tensor, the same on every rank.

    `split_dim` is the dimension of the Hugging Face tensors that tensor parallelism cuts into equal parts
    (None: not cut); every rank merges its parts into its parameter.
    """

    split_dim: int | None = None

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Merge one rank's parts of the Hugging Face tensors, in order, into that rank's Megatron parameter; shapes as
        in Rule.
        """
        return parts[0]

    def parts[Array: (torch.Tensor, np.ndarray)](self, parameter: Array) -> tuple[Array, ...]:
        """Split one rank's Megatron parameter into its parts of the Hugging Face tensors, in shape: the inverse of
        merge.

        Arrays of NumPy are split in the same way, so that the planner can follow row numbers without torch.
        """
        return (parameter,)

    def sections(self, tensor: int) -> tuple[int, ...]:
        """Return the sizes, in any unit, of the sections of a Hugging Face tensor that are each cut on their own; (1,):
        the whole.

        `tensor` is its place among the rule's tensors; a part has the rank's piece of each section, one after another.
        """
        return (1,)

    def join(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Join the Megatron parameters of all tensor-parallel ranks, in order, into the full Hugging Face tensors, in
        their shapes.
        """
        if self.split_dim is None:
            return self.parts(shards[0])
        by_tensor = zip(*(self.parts(shard) for shard in shards), strict=True)
        return tuple(self._joined(number, parts) for number, parts in enumerate(by_tensor))

    def _joined(self, tensor: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        dim, sections = self.split_dim, self.sections(tensor)
        if dim is None or len(sections) == 1:
            return _joined(parts, dim or 0)
        cut = [part.split([size * part.shape[dim] // sum(sections) for size in sections], dim) for part in parts]
        return _joined([_joined(section, dim) for section in zip(*cut, strict=True)], dim)


@dataclass(frozen=True)
class GateUp(Rule):
    """SwiGLU's two matrices, each cut by rows, gate above up."""

    split_dim: int = 0

    def merge(self, parts):
        """Concatenate gate and up, [rows, in] each: [2 rows, in]."""
        return _joined(parts)

    def parts(self, parameter):
        """Split [2 rows, in] into gate and up."""
        return _cut(parameter, [len(parameter) // 2] * 2)


@dataclass(frozen=True)
class QueryKeyValue(Rule):
    """Query, key and value, cut by rows; in Megatron each KV group's queries, key and value are contiguous."""

    split_dim: int = 0
    heads_per_group: int = 1
    head_dim: int = 1

    def merge(self, parts):
        """Interleave query, key and value, [rows, ...] each, by KV group: [all rows, ...]."""
        query, key, value = parts
        groups = key.shape[0] // self.head_dim
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in (query, key, value)]
        return _joined(grouped, 1).flatten(0, 1)

    def parts(self, parameter):
        """Split [all rows, ...] into query, key and value."""
        rows = (self.heads_per_group * self.head_dim, self.head_dim, self.head_dim)
        grouped = parameter.reshape(-1, sum(rows), *parameter.shape[1:])
        return tuple(_flat(part, 2) for part in _cut(grouped, rows, 1))


@dataclass(frozen=True)
class GatedQueryKeyValue(QueryKeyValue):
    """As QueryKeyValue where attention's output has a gate: a head's query and gate are contiguous in the first tensor.

    In Megatron each KV group has its queries, then their gates, then key and value (SelfAttention,
    get_query_key_value_tensors with output_gate).
    """

    def merge(self, parts):
        """Interleave query with gate, key and value, [rows, ...] each, by KV group: [all rows, ...]."""
        both, key, value = parts
        heads = both.reshape(-1, self.heads_per_group, 2, self.head_dim, *both.shape[1:])
        return super().merge((heads.transpose(1, 2).flatten(0, 3), key, value))

    def parts(self, parameter):
        """Split [all rows, ...] into query with gate, key and value."""
        rows = (2 * self.heads_per_group * self.head_dim, self.head_dim, self.head_dim)
        grouped = parameter.reshape(-1, sum(rows), *parameter.shape[1:])
        both, key, value = (_flat(part, 2) for part in _cut(grouped, rows, 1))
        heads = both.reshape(-1, 2, self.heads_per_group, self.head_dim, *both.shape[1:])
        return _flat(heads.swapaxes(1, 2), 4), key, value


@dataclass(frozen=True)
class Stacked(Rule):
    """Tensors stacked along their rows, and sections within them: each section is cut by rows on its own.

    `rows` has, for every tensor, the rows of its sections in the whole model.
    """

    split_dim: int = 0
    rows: tuple[tuple[int, ...], ...] = ()

    def sections(self, tensor):
        """Return the rows of the sections of a tensor."""
        return self.rows[tensor]

    def merge(self, parts):
        """Concatenate the tensors along their rows."""
        return _joined(parts)

    def parts(self, parameter):
        """Split the rows of a parameter into its tensors."""
        sizes = [sum(sections) for sections in self.rows]
        return _cut(parameter, [size * len(parameter) // sum(sizes) for size in sizes])


@dataclass(frozen=True)
class Vocabulary(Rule):
    """An embedding or output layer, cut by rows after its rows were padded with zeros to fit."""

    split_dim: int = 0
    rows: int = 0
    """Rows without padding."""

    def join(self, shards):
        """Concatenate the shards [rows of a rank, hidden] and drop the padding: [rows, hidden]."""
        return (_joined(shards)[: self.rows],)


Row = tuple[str, tuple[str, ...], Rule, int | None]
"""Megatron name, Hugging Face names, rule, expert-parallel rank."""


def spans(rule: Rule, tensor: int, size: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Return (begin, end) of what shard `rank` of `ranks` has of the rule's Hugging Face tensor of `size` along
    split_dim.

    The spans are in the order of the shard's part. Where `ranks` does not divide a size (the vocabulary), the last
    spans are short.
    """
    sections = rule.sections(tensor)
    unit, found, begin = size // sum(sections), [], 0
    for section in sections:
        length = unit * section if len(sections) > 1 else size
        each = math.ceil(length / ranks)
        found.append((begin + min(rank * each, length), begin + min((rank + 1) * each, length)))
        begin += length
    return found


def _joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    import torch

    return torch.cat(tuple(parts), dim=dim)


def _cut[Array: (torch.Tensor, np.ndarray)](array: Array, sizes: Sequence[int], dim: int = 0) -> tuple[Array, ...]:
    """Return views of consecutive `sizes` along `dim`, as torch.split does."""
    found = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        place: tuple[slice, ...] = (*[slice(None)] * dim, slice(end - size, end))
        found.append(array[place])
    return tuple(found)


def _flat[Array: (torch.Tensor, np.ndarray)](array: Array, dims: int) -> Array:
    """Merge the first `dims` dimensions into one."""
    return array.reshape(math.prod(array.shape[:dims]), *array.shape[dims:])
