"""Where Hugging Face tensors come from: safetensors files, or a seed. Both hand out slices."""

from __future__ import annotations

import json
import math
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import EMBEDDING, HEAD, ROUTER_BIAS, hf_shapes

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_JOINED_EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


class Safetensors:
    """The safetensors of a model directory, one file or several with an index; a context manager.

    Opening reads the headers alone and checks that they account for exactly the tensors of `architecture`,
    shape by shape. Raises UserError otherwise, and for a missing, truncated or damaged file.
    """

    def __init__(self, directory: str | Path, architecture: Architecture):
        self._directory = Path(directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        with ExitStack() as opened:
            for path in weight_files(self._directory):
                file = opened.enter_context(open_safetensors(path))
                self._files |= dict.fromkeys(file.keys(), file)
            self._check(architecture)
            self._stack = opened.pop_all()

    def __enter__(self) -> Safetensors:
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor `name`, or its slice [start, stop) along `dim` (0 or 1); nothing else is read."""
        view = self._files[name].get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def has(self, name: str) -> bool:
        """Whether the files hold a tensor of that name."""
        return name in self._files

    def _check(self, architecture: Architecture) -> None:
        shapes = hf_shapes(architecture)
        if architecture.tied and HEAD in self._files:
            # Some writers store the tied output layer a second time.
            shapes[HEAD] = shapes[EMBEDDING]
        given = {
            name
            for name in self._files
            if not name.endswith("rotary_emb.inv_freq") and not is_left_out(name, architecture)
        }
        joined = sorted(name for name in given if name.endswith(_JOINED_EXPERTS))
        if joined:
            raise UserError(
                f"{self._directory} has all experts of a layer in one tensor ({joined[0]}), which SGLang does not "
                f"read; write the model with save_pretrained of transformers, which has a tensor for each."
            )
        for what, names in (("lacks", shapes.keys() - given), ("has the unknown", given - shapes.keys())):
            if names:
                raise UserError(
                    f"{self._directory} {what} tensor {min(names)} ({len(names)} such); "
                    f"use weights that fit its config.json."
                )
        for name, shape in shapes.items():
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise UserError(
                    f"{self._directory}: tensor {name} has shape {found}, config.json says {shape}; "
                    f"use weights that fit its config.json."
                )


def is_left_out(name: str, architecture: Architecture) -> bool:
    """Whether the tensor `name` belongs to what a policy of this architecture is without."""
    return name.startswith(architecture.left_out) if architecture.left_out else False


class Random:
    """Fresh weights: norms 1, biases 0, matrices normal with the architecture's initializer_range.

    Each tensor is drawn whole from a seed of its own, so it does not depend on the layout.
    """

    def __init__(self, architecture: Architecture, seed: int):
        self._shapes = hf_shapes(architecture)
        self._std = architecture.initializer_range
        self._seed = seed

    def __enter__(self) -> Random:
        return self

    def __exit__(self, *exception) -> None:
        return None

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """As Safetensors.read."""
        import torch

        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            whole = torch.ones(shape)
        elif name.endswith((".bias", ROUTER_BIAS)):
            whole = torch.zeros(shape)
        else:
            # torch's CPU generator looks at 32 bits of a seed only.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
            whole = torch.empty(shape).normal_(0.0, self._std, generator=generator)
        return whole[start:stop] if dim == 0 else whole[:, start:stop]


def read_part(
    source: Safetensors | Random, name: str, shape: tuple[int, ...], dim: int | None, rank: int, ranks: int
) -> torch.Tensor:
    """Rank `rank`'s part of the tensor `name` cut into `ranks` equal parts along `dim`; None: all of it.

    Where `ranks` does not divide the rows (the vocabulary), they count as padded with zeros until it does.
    """
    import torch

    if dim is None:
        return source.read(name)
    size = math.ceil(shape[dim] / ranks)
    start, stop = min(rank * size, shape[dim]), min((rank + 1) * size, shape[dim])
    part = source.read(name, dim, start, stop)
    if stop - start == size:
        return part
    padding = part.new_zeros(size - (stop - start), *shape[1:])
    return torch.cat([part, padding])


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model directory. Raises UserError where there are none, or one of the index is missing."""
    index = directory / INDEX
    if not index.is_file():
        single = directory / SINGLE
        if not single.is_file():
            raise UserError(f"{directory} holds no safetensors weights; fetch the model again.")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index; fetch the model again.") from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} lacks {missing[0]}, which {INDEX} names; fetch the model again.")
    return [directory / name for name in names]


def open_safetensors(path: Path):
    """The open file, a context manager. Raises UserError where it is truncated or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); fetch the model again.") from error
