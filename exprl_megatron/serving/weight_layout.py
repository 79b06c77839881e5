"""What the parameters of an SGLang server's ranks are made of, by rules on the names of Hugging Face tensors.

These rules do not ask the server's loader, as loader_trace.py does: so a checksum finds a loader, or a trace of one,
that puts a weight in the wrong place. SGLang 0.5.23 joins the query, key and value
projections along the rows, the gate and up projections too, and those of all experts of a layer in order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exprl_megatron.models.name_map import dtype_of
from exprl_megatron.serving.sharding import Cut, Device, rank_cut
from exprl_megatron.serving.transfer_tables import RECTANGLE, areas

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Dense parameters that are joined, and their parts in order."""
EXPERT_PARTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}
"""The same of the experts of a layer: expert by expert these parts."""
_FUSED_BY = {part: fused for fused, parts in FUSED.items() for part in parts}
_EXPERTS_BY = {part: name for name, parts in EXPERT_PARTS.items() for part in parts}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def served_dtype(name: str, dtype: str, sigmoid_router: bool) -> str:
    """What a server whose model is in `dtype` keeps the parameter `name` in; both are torch dtypes' names.

    SGLang 0.5.23 keeps a sigmoid router's weight and bias in fp32 (Glm4MoeGate).
    """
    router = sigmoid_router and name.endswith(".mlp.gate.weight")
    return "float32" if router else dtype_of(name, dtype)


@dataclass(frozen=True)
class ServerPart:
    """A Hugging Face tensor as a part of a server's parameter."""

    parameter: str
    module: str
    """`q_proj`, `embed_tokens` and so on; an expert's as in Qwen's models."""
    position: int
    """Among the parts, which follow one another along the rows."""
    is_expert: bool = False


@dataclass(frozen=True)
class ServerParameters:
    """All parameters of one rank. A parameter is seen as [rows, columns], a vector as one column."""

    shapes: dict[str, tuple[int, ...]]
    """As the server has them; a parameter's number is its place here."""
    needs: np.ndarray
    """RECTANGLE: what the rank holds of which Hugging Face tensor, by the place of its name."""
    places: np.ndarray
    """RECTANGLE [needs]: where in which parameter each of them is."""
    padding: np.ndarray
    """RECTANGLE: what of the parameters is zero and belongs to no tensor."""


def server_part(name: str) -> ServerPart:
    """Which part of which parameter the Hugging Face tensor `name` is."""
    if expert := _EXPERT.fullmatch(name):
        module = _MIXTRAL.get(expert[3], expert[3])
        joined = _EXPERTS_BY[module]
        parts = EXPERT_PARTS[joined]
        return ServerPart(f"{expert[1]}.{joined}", module, int(expert[2]) * len(parts) + parts.index(module), True)
    path, _, kind = name.rpartition(".")
    parent, _, module = path.rpartition(".")
    if fused := _FUSED_BY.get(module):
        return ServerPart(f"{parent}.{fused}.{kind}", module, FUSED[fused].index(module))
    return ServerPart(name, module, 0)


def server_parameters(
    shapes: Mapping[str, tuple[int, ...]], *, tp: int, kv_heads: int, server: Device
) -> list[ServerParameters]:
    """The parameters of each rank of a server that holds the tensors of `shapes`; `kv_heads`: the model's."""
    joined = _joined(shapes)
    return [_of_rank(joined, rank, tp, kv_heads, server) for rank in range(tp)]


@dataclass(frozen=True)
class _Joined:
    """Tensors in the order in which they make up the parameters, contiguous."""

    parameters: dict[str, ServerPart]
    """Of each parameter its last part."""
    kinds: list[tuple[str, tuple[int, ...]]]
    """Module and shape of tensors that are cut alike."""
    tensors: np.ndarray
    """[tensors]: the place of each one's name."""
    kind: np.ndarray
    """[tensors]: number in `kinds`."""
    numbers: np.ndarray
    """[tensors]: the parameter that each is a part of."""


def _joined(shapes: Mapping[str, tuple[int, ...]]) -> _Joined:
    parts = [server_part(name) for name in shapes]
    parameters: dict[str, ServerPart] = {}
    numbers: dict[str, int] = {}
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    for part in parts:
        numbers.setdefault(part.parameter, len(numbers))
        if part.parameter not in parameters or part.position > parameters[part.parameter].position:
            parameters[part.parameter] = part
    kind = [kinds.setdefault((p.module, shape), len(kinds)) for p, shape in zip(parts, shapes.values(), strict=True)]
    number = np.array([numbers[part.parameter] for part in parts])
    order = np.lexsort((np.array([part.position for part in parts]), number))
    return _Joined(parameters, list(kinds), order, np.array(kind)[order], number[order])


def _of_rank(joined: _Joined, rank: int, tp: int, kv_heads: int, server: Device) -> ServerParameters:
    held, zeros = (
        np.array(rectangles)
        for rectangles in zip(
            *(_held_of(shape, rank_cut(module, shape, rank, tp, kv_heads, server)) for module, shape in joined.kinds),
            strict=True,
        )
    )
    # Of each kind: rows with the zeros behind them, and the same of columns.
    heights = np.maximum(held[:, 1], zeros[:, 0] + zeros[:, 1])
    widths = np.maximum(held[:, 3], zeros[:, 2] + zeros[:, 3])
    height = heights[joined.kind]
    ends = np.cumsum(height)
    firsts = np.flatnonzero(np.diff(joined.numbers, prepend=-1))
    lasts = np.append(firsts[1:], len(height)) - 1
    # Where each tensor's rows begin within its parameter.
    row = ends - height - (ends - height)[firsts][joined.numbers]
    shapes = {}
    for (name, part), last in zip(joined.parameters.items(), lasts.tolist(), strict=True):
        rows, width = int(row[last] + height[last]), int(widths[joined.kind[last]])
        shapes[name] = _shape(part, rows, width, len(joined.kinds[joined.kind[last]][1]))
    needs = _table(joined.tensors, held[joined.kind])
    places = _table(joined.numbers, held[joined.kind])
    places["row"], places["column"] = row, 0
    padding = _table(joined.numbers, zeros[joined.kind])
    padding["row"] += row.astype(np.int32)
    there = areas(needs) > 0
    return ServerParameters(shapes, needs[there], places[there], padding[areas(padding) > 0])


def _held_of(shape: tuple[int, ...], cut: Cut | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Row, rows, column and columns of a rank's part, and of the zeros behind it, seen from the part's first number."""
    extents = [(0, size) for size in (*shape, 1)[:2]]
    zeros = [(0, 0), (0, 0)]
    if cut is not None:
        extents[cut.dim] = (cut.start, cut.count)
        zeros = [(0, size) for _, size in extents]
        zeros[cut.dim] = (cut.count, cut.padding)
    return (*extents[0], *extents[1]), (*zeros[0], *zeros[1])


def _shape(last: ServerPart, height: int, width: int, dims: int) -> tuple[int, ...]:
    """Of a parameter of `height` rows, whose `last` part has `dims` dimensions; experts are one dimension more."""
    if last.is_expert:
        count = last.position // len(EXPERT_PARTS[last.parameter.rpartition(".")[2]]) + 1
        return (count, height // count, width)
    return (height, width) if dims == 2 else (height,)


def _table(numbers: np.ndarray, rectangles: np.ndarray) -> np.ndarray:
    made = np.empty(len(numbers), dtype=RECTANGLE)
    made["of"] = numbers
    for at, field in enumerate(("row", "rows", "column", "columns")):
        made[field] = rectangles[:, at]
    return made
