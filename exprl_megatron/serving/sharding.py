"""How an SGLang server cuts Hugging Face tensors over its tensor-parallel ranks, by the names of their modules.

Query, key, value, gate and up projections, the embedding and the head are cut by rows, output and down projections by
columns, the rest is whole on every rank (SGLang 0.5.23). What of that is equal parts is padded with zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from exprl_megatron.serving.loader_commands import RequiredSlice

Device = Literal["cpu", "cuda"]
"""What a server runs on."""
_VOCABULARY = ("embed_tokens", "lm_head")
_MLP_BY_ROWS = ("gate_proj", "up_proj", "w1", "w3")
_MLP_BY_COLUMNS = ("down_proj", "w2")
_BY_ROWS = ("q_proj", "k_proj", "v_proj", *_MLP_BY_ROWS, *_VOCABULARY)
_BY_COLUMNS = ("o_proj", *_MLP_BY_COLUMNS)
_VOCABULARY_MULTIPLE = 64
_CPU_MLP_MULTIPLE = 32
"""On a CPU each rank holds a multiple of so many of an MLP's inner numbers, the last ones zero."""


@dataclass(frozen=True)
class Cut:
    """One rank's part of a tensor along a dimension."""

    dim: int
    start: int
    count: int
    padding: int
    """Zeros behind it."""


@lru_cache(maxsize=4096)
def rank_cut(module: str, shape: tuple[int, ...], rank: int, tp: int, kv_heads: int, server: Device) -> Cut | None:
    """What rank `rank` of `tp` holds of a tensor of the module (`q_proj`, `embed_tokens`, ...); None: all of it.

    `kv_heads`: the model's; where `tp` is more, ranks share them.
    """
    dim = 0 if module in _BY_ROWS else 1 if module in _BY_COLUMNS else None
    if dim is None:
        return None
    if module in ("k_proj", "v_proj") and kv_heads < tp:
        rank, tp = rank * kv_heads // tp, kv_heads
    padded = _up(shape[dim], _VOCABULARY_MULTIPLE) if module in _VOCABULARY else shape[dim]
    inner = server == "cpu" and module in (*_MLP_BY_ROWS, *_MLP_BY_COLUMNS)
    size = _up(padded, tp * _CPU_MLP_MULTIPLE if inner else tp) // tp
    start = min(rank * size, shape[dim])
    count = min(size, shape[dim] - start)
    return Cut(dim, start, count, size - count)


def server_needs(shapes: Mapping[str, tuple[int, ...]], tp: int, kv_heads: int) -> list[list[RequiredSlice]]:
    """What each rank of a server on CUDA holds of the tensors of `shapes`, without asking one."""
    return [
        [
            _need(name, shape, rank_cut(name.split(".")[-2], shape, rank, tp, kv_heads, "cuda"))
            for name, shape in shapes.items()
        ]
        for rank in range(tp)
    ]


def _need(name: str, shape: tuple[int, ...], cut: Cut | None) -> RequiredSlice:
    extents = [(0, size) for size in (*shape, 1)[:2]]
    if cut is not None:
        extents[cut.dim] = (cut.start, cut.count)
    return RequiredSlice(name, *extents[0], *extents[1])


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
