"""Reads a model's weights in either form, one parameter at a time, under their Hugging Face names."""

import json
from pathlib import Path
from typing import Protocol

import torch
import yaml

from exprl_megatron.conversion.partial import file_marks
from exprl_megatron.conversion.safetensors_files import DTYPES, headers, read_tensor
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, read_architecture
from exprl_megatron.models.joined_experts import pieces
from exprl_megatron.models.left_out import left_out_tensors
from exprl_megatron.models.name_map import HEAD, embedding
from exprl_megatron.models.recorded import differing_fields
from exprl_megatron.models.stored_parameters import StoredParameter
from exprl_megatron.models.weight_readers import (
    FLOATS,
    Safetensors,
    has_joined_experts,
    open_safetensors,
    weight_files,
)
from exprl_megatron.policy.megatron_files import MEGATRON, MegatronFiles


class Weights(Protocol):
    """A model's weights, checked when opened: every tensor is there, in its shape, and none that is unknown."""

    architecture: Architecture
    origin: Path
    """The directory with config.json and tokenizer."""
    joined_experts: bool
    """Whether all experts of a layer are one tensor of the model in Hugging Face form (see models.joined_experts)."""

    def tensors(self, stored: StoredParameter) -> tuple[torch.Tensor, ...]:
        """Return the Hugging Face tensors of one parameter, whole and in their stored dtype, in the order of its
        hf_names.
        """

    def dtype(self, stored: StoredParameter) -> torch.dtype:
        """Return the dtype of the tensors of one parameter."""

    def marks(self) -> list[list]:
        """Return marks that change when the files change."""


class HuggingFaceWeights:
    """A directory with safetensors; see Weights.

    Raises:
        UserError: it does not hold its model.
    """

    def __init__(self, directory: Path):
        self.origin = directory
        self.architecture = read_architecture(directory)
        with Safetensors(directory, self.architecture):
            self._paths = weight_files(directory)
        self._headers = headers(self._paths)
        self._pieces = pieces(self._headers, self.architecture)
        self.joined_experts = bool(self._pieces)
        unknown = {(name, dtype) for name, (_, _, dtype) in self._headers.items() if dtype not in FLOATS}
        if unknown:
            name, dtype = min(unknown)
            raise UserError(f"{directory}: tensor {name} has dtype {dtype}; use weights in {', '.join(FLOATS)}.")
        self._check_tied()

    def tensors(self, stored: StoredParameter) -> tuple[torch.Tensor, ...]:
        """Return the Hugging Face tensors of one parameter, whole and in their stored dtype."""
        return tuple(self._read(name) for name in stored.parameter.hf_names)

    def dtype(self, stored: StoredParameter) -> torch.dtype:
        """Return what Weights defines.

        Raises:
            UserError: the tensors differ.
        """
        files = {self._pieces[name].tensor if name in self._pieces else name for name in stored.parameter.hf_names}
        found = {self._headers[name][2] for name in files}
        if len(found) > 1:
            raise UserError(
                f"{self.origin}: {' and '.join(stored.parameter.hf_names)} have the dtypes {', '.join(sorted(found))}; "
                f"give --dtype."
            )
        return DTYPES[found.pop()]

    def marks(self) -> list[list]:
        """Return what Weights defines."""
        return file_marks(self._paths)

    def _read(self, name: str) -> torch.Tensor:
        piece = self._pieces.get(name)
        if piece is None:
            return read_tensor(self._headers[name][0], name)
        with open_safetensors(self._headers[piece.tensor][0]) as file:
            return file.get_slice(piece.tensor)[piece.expert, piece.begin : piece.end]

    def _check_tied(self) -> None:
        """Refuse an output layer that differs from the tied embedding: it would be lost silently."""
        name = embedding(self.architecture)
        if self.architecture.tied and HEAD in self._headers and not torch.equal(self._read(HEAD), self._read(name)):
            raise UserError(
                f"{self.origin} ties its embeddings but {HEAD} differs from {name}; "
                f"set tie_word_embeddings to false in its config.json."
            )


class MegatronWeights:
    """Megatron's files in `files`, of the model that `origin` describes; see Weights."""

    def __init__(self, files: Path, origin: Path):
        self.origin = origin
        self.architecture = read_architecture(origin)
        self.files = MegatronFiles(files, self.architecture)
        self.joined_experts = has_joined_experts(origin, self.architecture)

    def tensors(self, stored: StoredParameter) -> tuple[torch.Tensor, ...]:
        """Return the Hugging Face tensors of one parameter, whole and in their stored dtype."""
        return stored.parameter.rule.join([self.files.read(stored)])

    def dtype(self, stored: StoredParameter) -> torch.dtype:
        """Return what Weights defines."""
        return self.files.dtype(stored)

    def marks(self) -> list[list]:
        """Return what Weights defines."""
        beside = set(left_out_tensors(self.origin, self.architecture).values())
        return file_marks([*beside, *(path for path in self.files.directory.iterdir() if path.is_file())])


def open_weights(path: Path, origin: Path | None = None) -> Weights:
    """Return the weights in `path`: a model directory, a converted one, a checkpoint, or a run (then its newest
    checkpoint).

    A checkpoint has neither config.json nor tokenizer: they are those of `origin`, by default of the model that its run
    began with.

    Raises:
        UserError: nothing of the kind is there, or `origin` describes another model.
    """
    path = Path(path)
    if path.name.endswith((".partial", ".tmp")):
        raise UserError(f"{path} was never finished; run the command that was writing it again.")
    if (path / MEGATRON).is_dir():
        return MegatronWeights(path / MEGATRON, path)
    if (path / "config.json").is_file():
        return HuggingFaceWeights(path)
    if (path / "checkpoints").is_dir():
        path = _newest(path)
    if not (path / "state.json").is_file():
        raise UserError(f"{path} is no model directory, converted directory, checkpoint or run; give one of these.")
    origin = origin or _model_of_run(path)
    _check_same_model(path, origin)
    return MegatronWeights(path, origin)


def _newest(run: Path) -> Path:
    complete = [path for path in (run / "checkpoints").glob("checkpoint-????????") if (path / "state.json").is_file()]
    if not complete:
        raise UserError(f"The run in {run} has no complete checkpoint; give another.")
    return max(complete)


def _model_of_run(checkpoint: Path) -> Path:
    config = checkpoint.resolve().parent.parent / "config.yaml"
    try:
        origin = Path(yaml.safe_load(config.read_text(encoding="utf-8"))["policy"]["model"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} is in no run that would name its model; give it by --origin.") from error
    if not origin.is_dir():
        raise UserError(
            f"The model {origin} that {checkpoint} began with is not there; give its directory by --origin."
        )
    return origin


def _check_same_model(checkpoint: Path, origin: Path) -> None:
    try:
        recorded = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}/state.json is damaged ({error}); choose another checkpoint.") from error
    if differing := differing_fields(recorded, read_architecture(origin)):
        raise UserError(
            f"{origin} describes another model than {checkpoint} holds ({', '.join(differing)}); "
            f"give the run's own by --origin."
        )
