"""Reads and writes safetensors one tensor at a time.

The safetensors library writes a file from tensors that are all in memory; a 70B model's are not.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from exprl_megatron.errors import UserError
from exprl_megatron.models.weight_readers import open_safetensors

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""The format's name of each torch dtype (https://github.com/huggingface/safetensors, section Format)."""
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
Described = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors by name."""


def write_safetensors(
    path: Path,
    described: Described,
    tensors: Iterable[tuple[str, torch.Tensor]],
    wrote: Callable[[int], None],
) -> None:
    """Write `tensors`, an iterator in the order of `described`, and sync the file.

    `described` gives shape and dtype by name; `wrote` receives the bytes of each.

    Raises:
        ValueError: they do not come as described.
    """
    partial = path.with_name(path.name + ".tmp")
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in described.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    left = list(described)
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            if not left or left.pop(0) != name or described[name] != (tuple(tensor.shape), tensor.dtype):
                raise ValueError(f"{name} came as {tuple(tensor.shape)} {tensor.dtype}, which was not described")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            wrote(tensor.nbytes)
        if left:
            raise ValueError(f"{left[0]} was described but did not come")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor, in the shape and dtype of the file, which is mapped into memory only as long as the tensor
    exists.
    """
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def copied(path: Path, described: Described, sources: Mapping[str, Path], wrote: Callable[[int], None]) -> None:
    """Copy the tensors of `described` from their files in `sources` to `path`, unchanged."""
    write_safetensors(path, described, ((name, read_tensor(sources[name], name)) for name in described), wrote)


def describe(sources: Mapping[str, Path]) -> Described:
    """Return the shape and dtype of tensors by name, each from its file in `sources`.

    Raises:
        UserError: a dtype is not known.
    """
    found = headers(set(sources.values()))
    for name in sources:
        if found[name][2] not in DTYPES:
            raise UserError(f"{found[name][0]}: tensor {name} has dtype {found[name][2]}, which cannot be copied.")
    return {name: (found[name][1], DTYPES[found[name][2]]) for name in sources}


def headers(paths: Iterable[Path]) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Return the file, shape and dtype (in the format's words) of every tensor in the files.

    Raises UserError where one is truncated or damaged.
    """
    found = {}
    for path in paths:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                view = file.get_slice(name)
                found[name] = (path, tuple(view.get_shape()), view.get_dtype())
    return found
