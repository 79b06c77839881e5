"""Megatron's torch_dist files, read a parameter at a time; opening them accounts for every parameter."""

import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.stored_parameters import StoredParameter, stored_parameters

MEGATRON = "megatron"
"""Subdirectory of Megatron's files in a converted model directory, next to config.json and tokenizer."""

_OTHERS = re.compile(r"(optimizer|start)\..*|(random|common_state)/.*|.*\._extra_state/.*")
"""What a run's checkpoint holds besides the current weights."""

COMMON = "common_state/shard_0_1"
"""The file in which Megatron looks for objects that are not tensors; a converted model has none."""

Pieces = dict[tuple[int, ...], list[ChunkStorageMetadata]]
"""The written pieces of a tensor by the layer (and expert) that they belong to."""


class MegatronFiles:
    """The weights of `architecture` in the torch_dist files of `directory`: a converted model's or a checkpoint's.

    Opening reads the metadata alone and checks that every parameter is there whole, in its shape, once, in a file
    long enough for its dtype, and that nothing is there that is not known. Raises UserError otherwise.
    """

    def __init__(self, directory: str | Path, architecture: Architecture):
        self.directory = Path(directory)
        self._reader = FileSystemReader(self.directory)
        metadata = self._metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata
        self._check(metadata, architecture)

    def dtype(self, stored: StoredParameter) -> torch.dtype:
        """Return the dtype of one parameter."""
        return self._tensors[stored.tensors[0].key].properties.dtype

    def read(self, stored: StoredParameter) -> torch.Tensor:
        """Read one parameter in its stored dtype and in the shape that a single rank would hold, without padding."""
        tensors = [self._read(tensor) for tensor in stored.tensors]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _read(self, stored: StoredParameter) -> torch.Tensor:
        ahead = (1,) * len(stored.index)
        target = torch.empty(ahead + stored.shape, dtype=self._tensors[stored.key].properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(stored.index + (0,) * len(stored.shape)), target.shape)
        tensor = self._tensors[stored.key]
        pieces = TensorStorageMetadata(tensor.properties, tensor.size, self._pieces[stored.key][stored.index])
        items = create_read_items_for_chunk_list(stored.key, pieces, [wanted])
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self.directory} is damaged at {stored.key} ({error}); convert or copy it again."
            ) from error
        return target.view(stored.shape)

    def _metadata(self) -> Metadata:
        if not (self.directory / "metadata.json").is_file() or not (self.directory / ".metadata").is_file():
            raise UserError(f"{self.directory} holds no complete Megatron files; convert or copy them again.")
        try:
            return self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.directory}/.metadata is damaged ({error}); convert or copy it again.") from error

    def _check(self, metadata: Metadata, architecture: Architecture) -> None:
        table = [tensor for stored in stored_parameters(architecture) for tensor in stored.tensors]
        known = {stored.key: len(stored.index) for stored in table}
        unknown = {key for key in self._tensors if key not in known and not _OTHERS.fullmatch(key)}
        for what, names in (("lacks the", known.keys() - self._tensors.keys()), ("has the unknown", unknown)):
            if names:
                raise UserError(
                    f"{self.directory} {what} Megatron parameter {min(names)} ({len(names)} such); "
                    f"use files that fit its config.json."
                )
        self._pieces = {key: _by_index(self._tensors[key], ahead) for key, ahead in known.items()}
        for stored in table:
            self._check_shape(stored)
            self._check_whole(stored)
        self._check_files(metadata, known.keys())

    def _check_shape(self, stored: StoredParameter) -> None:
        size = tuple(self._tensors[stored.key].size)
        expected = stored.counts + stored.shape
        rows = len(stored.counts)
        fits = size == expected
        if stored.padded:
            fits = (
                len(size) == len(expected) and size[rows] >= expected[rows] and size[rows + 1 :] == expected[rows + 1 :]
            )
        if not fits:
            raise UserError(
                f"{self.directory}: Megatron parameter {stored.key} has shape {size}, config.json says {expected}; "
                f"use files that fit its config.json."
            )

    def _check_whole(self, stored: StoredParameter) -> None:
        ahead = len(stored.index)
        pieces = self._pieces[stored.key].get(stored.index, [])
        whole = math.prod(self._tensors[stored.key].size[ahead:])
        numbers = sum(math.prod(piece.sizes) for piece in pieces)
        if numbers != whole or len({tuple(piece.offsets) for piece in pieces}) != len(pieces):
            raise UserError(
                f"{self.directory}: of {stored.key}{list(stored.index)} {numbers} numbers of {whole} are there; "
                f"convert or copy the files again."
            )

    def _check_files(self, metadata: Metadata, known: Iterable[str]) -> None:
        written = [(MetadataIndex(COMMON), 0)]
        for key in known:
            tensor = self._tensors[key]
            for piece in tensor.chunks:
                size = math.prod(piece.sizes) * tensor.properties.dtype.itemsize
                written.append((MetadataIndex(key, piece.offsets), size))
        ends: dict[str, int] = {}
        for index, size in written:
            info = metadata.storage_data.get(index)
            # The file has a header in addition to the numbers.
            if info is None or info.length <= size:
                raise UserError(f"{self.directory} does not say where all of {index.fqn} is stored; convert it again.")
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.directory / name
            if not file.is_file():
                raise UserError(f"{self.directory} lacks the file {name}; convert or copy it again.")
            if file.stat().st_size < end:
                raise UserError(
                    f"{file} is truncated ({file.stat().st_size} bytes of {end}); convert or copy it again."
                )


class _IntoTensor(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(offset, offset + length) for offset, length in places)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: the resolved tensor is a view of the target."""


def _by_index(tensor: TensorStorageMetadata, ahead: int) -> Pieces:
    found: Pieces = {}
    for piece in tensor.chunks:
        found.setdefault(tuple(piece.offsets[:ahead]), []).append(piece)
    return found
