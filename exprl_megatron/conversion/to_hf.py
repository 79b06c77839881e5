"""Converts Megatron's torch_dist files, of a converted model or a checkpoint, to Hugging Face form."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from exprl_megatron.conversion.partial import Partial
from exprl_megatron.conversion.safetensors_files import DTYPES, Described, copied, describe, headers, write_safetensors
from exprl_megatron.conversion.weights import Weights
from exprl_megatron.errors import UserError
from exprl_megatron.models import fp8_blocks as fp8
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.joined_experts import Joiner, joined_shape, place_of
from exprl_megatron.models.left_out import left_out_tensors
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.stored_parameters import StoredParameter, stored_parameters
from exprl_megatron.models.weight_readers import INDEX, SINGLE
from exprl_megatron.policy.huggingface import copy_companions, write_config

Format = Literal["fp8"] | torch.dtype | None
"""None keeps each tensor's dtype; `fp8` quantizes matrices in blocks and keeps the dtype of the rest."""
Unit = tuple[StoredParameter, ...]
"""Parameters that are written together."""


@dataclass(frozen=True)
class Form:
    """Names, shapes and dtypes of one model's tensors in one format."""

    shapes: dict[str, tuple[int, ...]]
    format: Format
    joined: Architecture | None = None
    """The model where all experts of a layer are written as one tensor; else None."""

    def describe_all(self, weights: Weights, unit: Unit) -> Described:
        """Return shapes and dtypes of what `tensors_of_all` will yield."""
        found = {name: entry for stored in unit for name, entry in self.describe(weights, stored).items()}
        if self.joined is None:
            return found
        described: Described = {}
        for name, entry in found.items():
            place = place_of(name, self.joined)
            name, shape = (place.tensor, joined_shape(place.tensor, self.joined)) if place else (name, entry[0])
            described[name] = shape, entry[1]
        return described

    def tensors_of_all(self, weights: Weights, unit: Unit) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the Hugging Face tensors of a unit."""
        joiner = Joiner(self.joined) if self.joined else None
        for stored in unit:
            tensors = self.tensors(weights, stored)
            yield from tensors if joiner is None else joiner.add(tensors)

    def describe(self, weights: Weights, stored: StoredParameter) -> Described:
        """Return shapes and dtypes of what `tensors` will yield."""
        found: Described = {}
        for name in stored.parameter.hf_names:
            shape = self.shapes[name]
            if self.format == "fp8" and fp8.is_quantized(name, shape):
                found[name] = shape, torch.float8_e4m3fn
                found[name + fp8.SCALE] = tuple(-(-size // fp8.BLOCK) for size in shape), torch.float32
            else:
                found[name] = shape, self._cast(stored) or weights.dtype(stored)
        return found

    def tensors(self, weights: Weights, stored: StoredParameter) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the names and tensors of one parameter, in the shapes and dtypes that `describe` states."""
        for name, tensor in zip(stored.parameter.hf_names, weights.tensors(stored), strict=True):
            if self.format == "fp8" and fp8.is_quantized(name, self.shapes[name]):
                values, scale = fp8.quantize(tensor)
                yield name, values
                yield name + fp8.SCALE, scale
            else:
                yield name, tensor.to(self._cast(stored) or tensor.dtype)

    def _cast(self, stored: StoredParameter) -> torch.dtype | None:
        """Return the dtype that a parameter is cast to, if it is; what is always in fp32 stays so."""
        return self.format if isinstance(self.format, torch.dtype) and not stored.parameter.keeps_dtype else None


def convert_to_huggingface(
    weights: Weights,
    target: Path,
    form: Format = None,
    file_bytes: int = 5 * 10**9,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `target`: config, tokenizer, safetensors of at most `file_bytes` (a single larger tensor apart), index.

    Interrupted, it continues with the first unfinished file when called again. `advance` receives the bytes done and in
    all. Raises UserError where a parameter or tensor is not accounted for.
    """
    shapes = hf_shapes(weights.architecture)
    table = [stored for stored in stored_parameters(weights.architecture) if stored.parameter.exported]
    if form == "fp8":
        fp8.check_quantizable([stored.parameter for stored in table], shapes, weights.architecture)
    made = Form(shapes, form, weights.architecture if weights.joined_experts else None)
    files = _cut(weights, _units(table, made), made, file_bytes)
    sources = left_out_tensors(weights.origin, weights.architecture)
    left_out = describe(sources)
    copies = _cut_described(left_out, file_bytes)
    described = [_described(weights, file, made) for file in files] + copies
    sizes = [sum(map(_bytes, file.values())) for file in described]
    names = [SINGLE] if len(described) == 1 else [_name(number, len(described)) for number in range(len(described))]
    plan = {"to": "huggingface", "source": weights.marks(), "format": str(form), "file_bytes": file_bytes}
    with Partial(Path(target), plan, sum(sizes), advance) as partial:
        for number, name in enumerate(names):
            if (partial.path / name).is_file():
                partial.wrote(sizes[number])
            elif number < len(files):
                tensors = (entry for unit in files[number] for entry in made.tensors_of_all(weights, unit))
                write_safetensors(partial.path / name, described[number], tensors, partial.wrote)
            else:
                copied(partial.path / name, described[number], sources, partial.wrote)
        if len(names) > 1:
            _write_index(partial.path / INDEX, dict(zip(names, described, strict=True)), sum(sizes))
        every = _written_shapes(shapes, made) | {name: shape for name, (shape, _) in left_out.items()}
        _write_config(weights, partial.path, form, fp8.quantization_config(list(shapes), list(left_out)), table)
        copy_companions(weights.origin, partial.path)
        partial.finish(lambda: _account(partial.path, names, described, every))


def _units(table: list[StoredParameter], form: Form) -> list[Unit]:
    """Return what must be in one file: each parameter, or those that are joined."""
    if form.joined is None:
        return [(stored,) for stored in table]
    units: dict[str, list[StoredParameter]] = {}
    for stored in table:
        place = place_of(stored.parameter.hf_names[0], form.joined)
        units.setdefault(place.tensor if place else stored.key + str(stored.index), []).append(stored)
    return [tuple(unit) for unit in units.values()]


def _written_shapes(shapes: dict[str, tuple[int, ...]], form: Form) -> dict[str, tuple[int, ...]]:
    """Return `shapes` with joined tensors in place of those that they are joined of."""
    if form.joined is None:
        return shapes
    places = {name: place_of(name, form.joined) for name in shapes}
    joined = {place.tensor for place in places.values() if place}
    return {name: shape for name, shape in shapes.items() if places[name] is None} | {
        name: joined_shape(name, form.joined) for name in joined
    }


def _cut(weights: Weights, units: list[Unit], form: Form, file_bytes: int) -> list[list[Unit]]:
    files: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        size = sum(map(_bytes, form.describe_all(weights, unit).values()))
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(unit)
        filled += size
    return files


def _cut_described(described: Described, file_bytes: int) -> list[Described]:
    """Return the content of each file, for tensors that are copied."""
    files: list[Described] = []
    filled = 0
    for name, entry in described.items():
        if not files or filled + _bytes(entry) > file_bytes:
            files.append({})
            filled = 0
        files[-1][name] = entry
        filled += _bytes(entry)
    return files


def _described(weights: Weights, file: list[Unit], form: Form) -> Described:
    found: Described = {}
    for unit in file:
        found |= form.describe_all(weights, unit)
    return found


def _bytes(described: tuple[tuple[int, ...], torch.dtype]) -> int:
    return torch.Size(described[0]).numel() * described[1].itemsize


def _name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(path: Path, files: dict[str, Described], total: int) -> None:
    weight_map = {tensor: name for name, described in files.items() for tensor in described}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _write_config(
    weights: Weights, directory: Path, form: Format, quantized: dict, table: list[StoredParameter]
) -> None:
    """Write config.json and the tokenizer; `quantized` is the config of quantization where the form is FP8."""
    dtype = form if isinstance(form, torch.dtype) else weights.dtype(table[0])
    changes = {"quantization_config": quantized} if form == "fp8" else {}
    write_config(weights.origin, directory, str(dtype).removeprefix("torch."), **changes)


def _account(directory: Path, names: list[str], described: list[Described], shapes: dict[str, tuple[int, ...]]) -> None:
    """Read the written files independently and check that every tensor is there, with its name, shape and dtype."""
    found = {
        name: (shape, DTYPES[dtype]) for name, (_, shape, dtype) in headers(directory / file for file in names).items()
    }
    expected = {name: entry for file in described for name, entry in file.items()}
    plain = {name: shape for name, (shape, _) in found.items() if not name.endswith(fp8.SCALE)}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    wrong += sorted(name for name in plain.keys() | shapes.keys() if plain.get(name) != shapes.get(name))
    if wrong:
        raise UserError(
            f"{directory}: {wrong[0]} ({len(wrong)} such) was not written as it should have been; convert again."
        )
