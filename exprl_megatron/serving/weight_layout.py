"""What the parameters of an SGLang server's ranks are made of, by rules on the names of Hugging Face tensors.

These rules do not ask the server's loader, as loader_trace.py does: so a checksum finds a loader, or a trace of one,
that puts a weight in the wrong place. SGLang 0.5.23 joins the query, key and value
projections along the rows, the gate and up projections too, and those of all experts of a layer in order. Of a gated
delta net it joins query, key, value and gate, and the two projections to a number for each head.

In models with gated delta nets norms multiply by 1 + their weight. SGLang has a second copy of each, `gemma_weight`,
with the 1 added, from which kernels on CUDA read: a buffer that only its own loader of weights keeps up to date.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.models.name_map import dtype_of
from exprl_megatron.serving.sharding import Cut, Device, module_of, parts_of, rank_cut, rectangle
from exprl_megatron.serving.transfer_tables import RECTANGLE, areas

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Dense parameters that are joined, and their parts in order."""
EXPERT_PARTS = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}
"""The same of the experts of a layer: expert by expert these parts."""
_FUSED_BY = {part: fused for fused, parts in FUSED.items() for part in parts}
_EXPERTS_BY = {part: name for name, parts in EXPERT_PARTS.items() for part in parts}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
PLUS_ONE = ".gemma_weight"
"""End of the name of the copy of a norm's weight with 1 added."""
_PLUS_ONE = ("layernorm.weight", ".q_norm.weight", ".k_norm.weight", ".norm.weight")
_PLAIN_NORM = ".linear_attn.norm.weight"
_OF_CONFIG = ".rotary_emb.axis_map"
"""End of the name of a buffer that SGLang's weight checker reports, although it follows from the config."""
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def served_dtype(name: str, dtype: str, sigmoid_router: bool) -> str:
    """Return the dtype of the parameter `name` in a server whose model is in `dtype`; both are torch's names.

    SGLang 0.5.23 keeps a sigmoid router's weight and bias in fp32 (Glm4MoeGate).
    """
    router = sigmoid_router and name.endswith(".mlp.gate.weight")
    return "float32" if router else dtype_of(name, dtype)


def is_weight(name: str) -> bool:
    """Return whether the tensor `name`, of those that SGLang's weight checker reports, is of the model's weights."""
    return not name.endswith(_OF_CONFIG)


def plus_one(name: str, delta_net: DeltaNet | None) -> str | None:
    """Return the server's copy of the norm's weight `name` with 1 added, by its name; None: it has none."""
    if delta_net is None or not name.endswith(_PLUS_ONE) or name.endswith(_PLAIN_NORM):
        return None
    return server_part(name, delta_net).parameter.removesuffix(".weight") + PLUS_ONE


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


def server_part(name: str, delta_net: DeltaNet | None = None) -> ServerPart:
    """Return which part of which parameter the Hugging Face tensor `name` is."""
    if delta_net is not None:
        # SGLang's Qwen3.5 has attention's projections and norms in the layer itself.
        name = name.replace("model.language_model.", "model.", 1).replace(".self_attn.", ".")
    if expert := _EXPERT.fullmatch(name):
        module = _MIXTRAL.get(expert[3], expert[3])
        joined = _EXPERTS_BY[module]
        parts = EXPERT_PARTS[joined]
        return ServerPart(f"{expert[1]}.{joined}", module, int(expert[2]) * len(parts) + parts.index(module), True)
    module = module_of(name)
    if fused := _FUSED_BY.get(module):
        path, _, kind = name.rpartition(".")
        return ServerPart(f"{path.rpartition('.')[0]}.{fused}.{kind}", module, FUSED[fused].index(module))
    return ServerPart(name, module, 0)


def server_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tp: int,
    kv_heads: int,
    server: Device,
    delta_net: DeltaNet | None = None,
) -> list[ServerParameters]:
    """Return the parameters of each rank of a server that holds the tensors of `shapes`, and their copies with 1 added.

    `kv_heads` and `delta_net`: the model's.
    """
    joined = _joined(shapes, delta_net)
    return [_of_rank(joined, rank, tp, kv_heads, server) for rank in range(tp)]


@dataclass(frozen=True)
class _Joined:
    """Sections of tensors in the order in which they make up the parameters, contiguous."""

    parameters: dict[str, ServerPart]
    """Of each parameter its last part."""
    kinds: list[tuple[str, tuple[int, ...]]]
    """Module and shape of sections that are cut alike."""
    tensors: np.ndarray
    """[sections]: the place of the name of each one's tensor."""
    rows: np.ndarray
    """[sections]: the first of each in its tensor."""
    kind: np.ndarray
    """[sections]: number in `kinds`."""
    numbers: np.ndarray
    """[sections]: the parameter that each is a part of."""


def _joined(shapes: Mapping[str, tuple[int, ...]], delta_net: DeltaNet | None) -> _Joined:
    parameters: dict[str, ServerPart] = {}
    numbers: dict[str, int] = {}
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    found = []
    for tensor, (name, shape) in enumerate(shapes.items()):
        part = server_part(name, delta_net)
        copy = plus_one(name, delta_net)
        for target in (part, *([ServerPart(copy, part.module, 0)] if copy else [])):
            number = numbers.setdefault(target.parameter, len(numbers))
            if target.parameter not in parameters or target.position > parameters[target.parameter].position:
                parameters[target.parameter] = target
            for row, section in parts_of(name, shape, delta_net):
                kind = kinds.setdefault((target.module, section), len(kinds))
                found.append((number, target.position, row, tensor, kind))
    table = np.array(found)
    table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
    return _Joined(parameters, list(kinds), table[:, 3], table[:, 2], table[:, 4], table[:, 0])


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
    # Each tensor's rows begin here within its parameter.
    row = ends - height - (ends - height)[firsts][joined.numbers]
    shapes = {}
    for (name, part), last in zip(joined.parameters.items(), lasts.tolist(), strict=True):
        rows, width = int(row[last] + height[last]), int(widths[joined.kind[last]])
        shapes[name] = _shape(part, rows, width, joined.kinds[joined.kind[last]][1])
    needs = _table(joined.tensors, held[joined.kind])
    needs["row"] += joined.rows.astype(np.int32)
    places = _table(joined.numbers, held[joined.kind])
    places["row"], places["column"] = row, 0
    padding = _table(joined.numbers, zeros[joined.kind])
    padding["row"] += row.astype(np.int32)
    there = areas(needs) > 0
    return ServerParameters(shapes, needs[there], places[there], padding[areas(padding) > 0])


def _held_of(shape: tuple[int, ...], cut: Cut | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the row, rows, column and columns of a rank's part, and of the zeros behind it, seen from the part's first
    number.
    """
    extents = [(0, size) for size in rectangle(shape)]
    zeros = [(0, 0), (0, 0)]
    if cut is not None:
        extents[cut.dim] = (cut.start, cut.count)
        zeros = [(0, size) for _, size in extents]
        zeros[cut.dim] = (cut.count, cut.padding)
    return (*extents[0], *extents[1]), (*zeros[0], *zeros[1])


def _shape(last: ServerPart, height: int, width: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a parameter of `height` rows, whose `last` part has this `shape`; experts add a dimension."""
    if last.is_expert:
        count = last.position // len(EXPERT_PARTS[last.parameter.rpartition(".")[2]]) + 1
        return (count, height // count, width)
    return (height, width) if len(shape) == 2 else (height, *shape[1:])


def _table(numbers: np.ndarray, rectangles: np.ndarray) -> np.ndarray:
    made = np.empty(len(numbers), dtype=RECTANGLE)
    made["of"] = numbers
    for at, field in enumerate(("row", "rows", "column", "columns")):
        made[field] = rectangles[:, at]
    return made
