"""Runs in SGLang's processes: checksums of the parameters of the model that serves, part by part.

The parts are the trainer's, which hashes the same ones where its ranks hold them: nobody joins a tensor.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch

from exprl_megatron.serving.part_hash import accumulate_hashes, hash_parts
from exprl_megatron.serving.transfer_tables import Slice, pack_needs, unpack_needs


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The names, shapes and dtypes that the trainer expects of one rank's parameters."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, list[int]]
    """As in `str(tensor.dtype)` without `torch.`: the parameters that have each, by their place in `shapes`."""
    parts: bytes
    """RECTANGLE, packed by `pack_needs`: of the parameters by their place in `shapes`; together they cover each."""


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer of one rank."""

    checksums: dict[str, str] = {}
    """See `checksums`."""
    error: str = ""
    """Why there are none."""


def pack_expected(shapes: Mapping[str, tuple[int, ...]], dtypes: Sequence[str], parts: np.ndarray) -> bytes:
    """Return the trainer's side of `checksums`; `dtypes` as `shapes`.

    Raises:
        ValueError: `parts` do not cover the parameters.
    """
    counts = np.zeros(len(shapes), dtype=np.int64)
    np.add.at(counts, parts["of"], parts["rows"].astype(np.int64) * parts["columns"])
    for (name, shape), count in zip(shapes.items(), counts.tolist(), strict=True):
        if count != math.prod(shape):
            raise ValueError(f"the parts of {name}, of shape {list(shape)}, have {count} numbers")
    places: dict[str, list[int]] = {}
    for place, dtype in enumerate(dtypes):
        places.setdefault(dtype, []).append(place)
    return msgspec.msgpack.encode(Expected(dict(shapes), places, pack_needs(parts)))


@torch.no_grad()
def checksums(held: Mapping[str, torch.Tensor], expected: bytes) -> dict[str, str]:
    """Return the checksum of each of the tensors that a model has, by name.

    In its place is what differs where one has another shape or dtype than expected, or is not expected at all.
    """
    wanted = msgspec.msgpack.decode(expected, type=Expected)
    grids = {name: (math.prod(shape[:-1]), shape[-1]) if shape[1:] else shape for name, shape in wanted.shapes.items()}
    parts = unpack_needs(wanted.parts, grids)
    names = list(wanted.shapes)
    dtypes = {names[place]: dtype for dtype, places in wanted.dtypes.items() for place in places}
    found = {}
    for name, tensor in held.items():
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if name not in wanted.shapes:
            found[name] = "not expected"
        elif (shape, dtype) != (wanted.shapes[name], dtypes.get(name)):
            found[name] = f"{dtype} {list(shape)}"
    able = [number for number, name in enumerate(names) if name in held and name not in found]
    parts = parts[np.isin(parts["of"], able)]
    grid = {number: as_grid(held[names[number]]) for number in able}
    hashes = hash_parts((Slice(*part), cut(grid[part[0]], Slice(*part))) for part in parts.tolist())
    sums = accumulate_hashes(parts["of"], hashes, len(names))
    return found | {names[number]: to_hex(sums[number]) for number in able}


def as_grid(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter as [rows, columns]; a vector is one column."""
    return tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def cut(grid: torch.Tensor, part: Slice) -> torch.Tensor:
    """Return the rectangle `part` of `grid` [rows, columns], as a view."""
    return grid.narrow(0, part.row, part.rows).narrow(1, part.column, part.columns)


def to_hex(checksum: int) -> str:
    """Return a checksum as text."""
    return f"{int(checksum):016x}"
