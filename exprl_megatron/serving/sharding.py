"""How an SGLang server cuts Hugging Face tensors over its tensor-parallel ranks, by the names of their modules.

Query, key, value, gate and up projections, the embedding and the head are cut by rows, output and down projections by
columns, the rest is whole on every rank (SGLang 0.5.23). All of a gated delta net but its norm is cut by heads; where
queries, keys and values are one tensor, each of them on its own.

What does not divide is padded with zeros: the vocabulary, and on a CPU an MLP's inner numbers and attention's heads too
(adjust_config_with_unaligned_cpu_tp). There ranks without a KV head of their own have one of zeros; on CUDA they share
the model's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.serving.loader_commands import RequiredSlice

Device = Literal["cpu", "cuda"]
"""What a server runs on."""
_VOCABULARY = ("embed_tokens", "lm_head")
_MLP_BY_ROWS = ("gate_proj", "up_proj", "w1", "w3")
_MLP_BY_COLUMNS = ("down_proj", "w2")
_BY_HEADS = ("A_log", "dt_bias")
"""Vectors of a gated delta net, which are in no module of their own."""
_QUERY_KEY_VALUE = ("in_proj_qkv", "conv1d")
_DELTA_NET = (*_QUERY_KEY_VALUE, "in_proj_z", "in_proj_b", "in_proj_a", *_BY_HEADS)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_BY_ROWS = ("q_proj", "k_proj", "v_proj", *_MLP_BY_ROWS, *_VOCABULARY, *_DELTA_NET)
_BY_COLUMNS = ("o_proj", "out_proj", *_MLP_BY_COLUMNS)
_VOCABULARY_MULTIPLE = 64
_CPU_MLP_MULTIPLE = 32
"""On a CPU each rank's part of an MLP's inner dimension is padded with zeros to a multiple of this."""


@dataclass(frozen=True)
class Cut:
    """One rank's part of a tensor along a dimension."""

    dim: int
    start: int
    count: int
    padding: int
    """Zeros behind it."""


def module_of(name: str) -> str:
    """Return the module of the Hugging Face tensor `name`: `q_proj`, `embed_tokens`, or a vector that is in none."""
    path, _, kind = name.rpartition(".")
    return kind if kind in _BY_HEADS else path.rpartition(".")[2]


def sections(module: str, rows: int, delta_net: DeltaNet | None) -> list[tuple[int, int]]:
    """Return the first row and rows of the sections of a module's tensor that are each cut on their own; `rows`: all of
    it.
    """
    if delta_net is None or module not in _QUERY_KEY_VALUE:
        return [(0, rows)]
    return [(0, delta_net.keys), (delta_net.keys, delta_net.keys), (2 * delta_net.keys, delta_net.values)]


def rectangle(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns as which a tensor is seen: a vector has one column."""
    return shape[0], math.prod(shape[1:])


@lru_cache(maxsize=4096)
def rank_cut(module: str, shape: tuple[int, ...], rank: int, tp: int, kv_heads: int, server: Device) -> Cut | None:
    """Return the part of a tensor of the module (`q_proj`, ...) that rank `rank` of `tp` holds; None: all of it.

    `kv_heads`: the model's.
    """
    dim = 0 if module in _BY_ROWS else 1 if module in _BY_COLUMNS else None
    if dim is None:
        return None
    if server == "cuda" and module in ("k_proj", "v_proj") and kv_heads < tp:
        rank, tp = rank * kv_heads // tp, kv_heads
    size = _padded(module, shape[dim], tp, kv_heads, server) // tp
    start = min(rank * size, shape[dim])
    count = min(size, shape[dim] - start)
    return Cut(dim, start, count, size - count)


def server_needs(
    shapes: Mapping[str, tuple[int, ...]], tp: int, kv_heads: int, delta_net: DeltaNet | None = None
) -> list[list[RequiredSlice]]:
    """Return the slices of the tensors of `shapes` that each rank of a CUDA server holds, without a request."""
    return [
        [
            _need(name, first, part, rank_cut(module_of(name), part, rank, tp, kv_heads, "cuda"))
            for name, shape in shapes.items()
            for first, part in parts_of(name, shape, delta_net)
        ]
        for rank in range(tp)
    ]


def parts_of(name: str, shape: tuple[int, ...], delta_net: DeltaNet | None) -> list[tuple[int, tuple[int, ...]]]:
    """Return the first row and shape of each of a tensor's `sections`."""
    return [(first, (rows, *shape[1:])) for first, rows in sections(module_of(name), shape[0], delta_net)]


def _need(name: str, first: int, shape: tuple[int, ...], cut: Cut | None) -> RequiredSlice:
    extents = [(0, size) for size in rectangle(shape)]
    if cut is not None:
        extents[cut.dim] = (cut.start, cut.count)
    return RequiredSlice(name, first + extents[0][0], extents[0][1], *extents[1])


def _padded(module: str, size: int, tp: int, kv_heads: int, server: Device) -> int:
    """Return the length, over all ranks, of a dimension of `size` with the zeros that are behind it."""
    if module in _VOCABULARY:
        padded = _up(size, _VOCABULARY_MULTIPLE)
        return padded if padded % tp == 0 else _up(size, _VOCABULARY_MULTIPLE * tp)
    if server == "cpu" and module in (*_MLP_BY_ROWS, *_MLP_BY_COLUMNS):
        return _up(size, tp * _CPU_MLP_MULTIPLE)
    if server == "cpu" and module in _ATTENTION:
        # Each KV head comes with the heads of queries that use it.
        return size // kv_heads * _up(kv_heads, tp)
    return _up(size, tp)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
