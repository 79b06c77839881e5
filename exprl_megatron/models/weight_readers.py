"""Where Hugging Face tensors come from: safetensors files, or a seed. Both hand out slices."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.delta_net_names import DECAY
from exprl_megatron.models.joined_experts import MARK, is_joined, joined_shape, may_be_joined, pieces
from exprl_megatron.models.name_map import HEAD, ROUTER_BIAS, Parameter, embedding, hf_shapes
from exprl_megatron.models.rules import spans

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "BF16", "F16")
"""The dtypes of weights, as safetensors names them; those of quantized weights mean nothing without their scales."""
_JOINED_EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


class Safetensors:
    """The safetensors of a model directory, one file or several with an index; a context manager.

    Opening reads the headers alone and checks that they account for exactly the tensors of `architecture`,
    shape by shape and each once. Raises UserError otherwise, and for a missing, truncated or damaged file.
    """

    def __init__(self, directory: str | Path, architecture: Architecture):
        self._directory = Path(directory)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        with ExitStack() as opened:
            for path in weight_files(self._directory):
                file = opened.enter_context(open_safetensors(path))
                self._add(path, file)
            self._pieces = pieces(self._files, architecture)
            self._check(architecture)
            self._stack = opened.pop_all()

    def __enter__(self) -> Safetensors:
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read the tensor `name` in its stored shape and dtype, or its slice [start, stop) along `dim` (0 or 1),
        without the rest of the file.
        """
        if (piece := self._pieces.get(name)) is not None:
            view, begin, end = self._files[piece.tensor].get_slice(piece.tensor), piece.begin, piece.end
            if dim == 0:
                return view[piece.expert, begin + start : end if stop is None else begin + stop]
            return view[piece.expert, begin:end, start:stop]
        view = self._files[name].get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def has(self, name: str) -> bool:
        """Return whether the files hold a tensor of that name."""
        return name in self._files or name in self._pieces

    def _add(self, path: Path, file: Any) -> None:
        for name in file.keys():  # noqa: SIM118
            if name in self._files:
                raise UserError(
                    f"{self._directory} has the tensor {name} in {path.name} and in another file; fetch the model "
                    f"again."
                )
            self._files[name] = file

    def _check(self, architecture: Architecture) -> None:
        shapes = hf_shapes(architecture)
        if architecture.tied and HEAD in self._files:
            # Some writers store the tied output layer a second time.
            shapes[HEAD] = shapes[embedding(architecture)]
        self._check_left_out(architecture)
        given = {
            name
            for name in self._files
            if not name.endswith("rotary_emb.inv_freq") and not is_left_out(name, architecture)
        }
        joined = {name for name in given if is_joined(name, architecture)}
        self._check_shapes({name: joined_shape(name, architecture) for name in joined})
        given = (given - joined) | self._pieces.keys()
        if unread := sorted(name for name in given if name.endswith(_JOINED_EXPERTS)):
            raise UserError(
                f"{self._directory} has all experts of a layer in one tensor ({unread[0]}), which SGLang does not "
                f"read; write the model with save_pretrained of transformers, which has a tensor for each."
            )
        for what, names in (("lacks", shapes.keys() - given), ("has the unknown", given - shapes.keys())):
            if names:
                raise UserError(
                    f"{self._directory} {what} tensor {min(names)} ({len(names)} such); "
                    f"use weights that fit its config.json."
                )
        self._check_shapes({name: shape for name, shape in shapes.items() if name not in self._pieces})
        check_no_other_weights(self._directory, self._files.keys())

    def _check_left_out(self, architecture: Architecture) -> None:
        """Refuse a layer behind the last one that is a layer like the others, not one of multi-token prediction."""
        for prefix in architecture.left_out:
            layer = prefix.startswith("model.layers.") and any(name.startswith(prefix) for name in self._files)
            if layer and f"{prefix}eh_proj.weight" not in self._files:
                raise UserError(
                    f"{self._directory} has tensors of {prefix.removesuffix('.')}, which is behind the "
                    f"{architecture.layers} layers of its config.json and is not one of multi-token prediction (it has "
                    f"no eh_proj.weight); use weights that fit its config.json."
                )

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise UserError(
                    f"{self._directory}: tensor {name} has shape {found}, config.json says {shape}; "
                    f"use weights that fit its config.json."
                )
            if (dtype := self._files[name].get_slice(name).get_dtype()) not in FLOATS:
                raise UserError(
                    f"{self._directory}: tensor {name} has dtype {dtype}; use weights in {', '.join(FLOATS)}."
                )


def check_no_other_weights(directory: Path, names: Collection[str]) -> None:
    """Check that no safetensors file beside `model.safetensors` has one of the tensors `names` too.

    SGLang reads all files of a directory that has no index, and keeps the tensor that it reads last.

    Raises:
        UserError: there is such a file.
    """
    if (directory / INDEX).is_file():
        return
    for path in sorted(set(directory.glob("*.safetensors")) - {directory / SINGLE}):
        with open_safetensors(path) as file:
            if found := sorted(set(names) & set(file.keys())):
                raise UserError(
                    f"{directory} has the tensor {found[0]} in {SINGLE} and in {path.name}, and servers read both; "
                    f"move {path.name} out of the directory."
                )


def is_left_out(name: str, architecture: Architecture) -> bool:
    """Return whether the tensor `name` is one of those that a policy of this architecture does not have."""
    return name.startswith(architecture.left_out) if architecture.left_out else False


def has_joined_experts(directory: Path, architecture: Architecture) -> bool:
    """Return whether a model directory, in Hugging Face form or with Megatron's files, is of a model with joined
    experts.
    """
    if not may_be_joined(architecture):
        return False
    if not any((directory / name).is_file() for name in (INDEX, SINGLE)):
        return (directory / MARK).is_file()
    for path in weight_files(directory):
        with open_safetensors(path) as file:
            if any(is_joined(name, architecture) for name in file.keys()):  # noqa: SIM118
                return True
    return False


class RandomWeights:
    """Fresh weights: norms 1, biases 0, matrices normal with the architecture's initializer_range.

    Each tensor is drawn whole from a seed of its own, so it does not depend on the layout.
    """

    def __init__(self, architecture: Architecture, seed: int):
        self._shapes = hf_shapes(architecture)
        self._std = architecture.initializer_range
        self._zero_centered = architecture.zero_centered_norms
        self._seed = seed

    def __enter__(self) -> RandomWeights:
        return self

    def __exit__(self, *exception) -> None:
        return None

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the tensor `name`, fp32 in its whole shape, or its slice [start, stop) along `dim`."""
        import torch

        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            zero = self._zero_centered and not name.endswith(".linear_attn.norm.weight")
            whole = torch.zeros(shape) if zero else torch.ones(shape)
        elif name.endswith(".linear_attn.dt_bias"):
            whole = torch.ones(shape)
        elif name.endswith(DECAY):
            # As transformers draws them, with equal steps in place of random ones.
            whole = torch.linspace(0.01, 16, shape[0]).log()
        elif name.endswith((".bias", ROUTER_BIAS)):
            whole = torch.zeros(shape)
        else:
            # torch's CPU generator uses only 32 bits of a seed.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
            whole = torch.empty(shape).normal_(0.0, self._std, generator=generator)
        return whole[start:stop] if dim == 0 else whole[:, start:stop]


def read_parts(
    source: Safetensors | RandomWeights, parameter: Parameter, shapes: dict[str, tuple[int, ...]], rank: int, ranks: int
) -> list[torch.Tensor]:
    """Return shard `rank` of `ranks` of each Hugging Face tensor of `parameter`, in the shapes that its rule merges.

    Where `ranks` does not divide the rows (the vocabulary), they count as padded with zeros until it does.
    """
    import torch

    rule, dim = parameter.rule, parameter.rule.split_dim
    if dim is None:
        return [source.read(name) for name in parameter.hf_names]
    found = []
    for number, name in enumerate(parameter.hf_names):
        size = shapes[name][dim]
        parts = [source.read(name, dim, *span) for span in spans(rule, number, size, rank, ranks)]
        missing = math.ceil(size / ranks) - sum(part.shape[dim] for part in parts)
        if missing:
            parts.append(parts[0].new_zeros(missing, *shapes[name][1:]))
        found.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim))
    return found


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors of a model directory.

    Raises:
        UserError: there are none, one of the index is missing, or it is unclear which are meant.
    """
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
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
    if single.is_file() and SINGLE not in names:
        raise UserError(
            f"{directory} has both {SINGLE} and {INDEX}, which names other files: transformers reads the former and "
            f"SGLang the latter; move one of them out of the directory."
        )
    return [directory / name for name in names]


def open_safetensors(path: Path):
    """Return the open file, a context manager.

    Raises:
        UserError: it is truncated or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); fetch the model again.") from error
