"""Converts a model directory in Hugging Face form to Megatron's torch_dist files, which any layout can load."""

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from exprl_megatron.conversion.partial import Partial
from exprl_megatron.conversion.safetensors_files import Described, copied, describe, headers
from exprl_megatron.conversion.weights import HuggingFaceWeights
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.joined_experts import MARK
from exprl_megatron.models.left_out import LEFT_OUT, left_out_tensors
from exprl_megatron.models.stored_parameters import StoredParameter, stored_parameters
from exprl_megatron.policy.huggingface import copy_companions, write_config
from exprl_megatron.policy.megatron_files import COMMON, MEGATRON, MegatronFiles
from exprl_megatron.utils.files import write_atomically
from exprl_megatron.utils.required import required


def convert_to_megatron(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5 * 10**9,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `target`: config, tokenizer, and the weights of `source` in files of about `file_bytes`.

    `dtype` None keeps each tensor's. Interrupted, it continues with the first unfinished file when called again.
    `advance` receives the bytes done and in all. Raises UserError where a tensor or parameter is not accounted for.
    """
    weights = HuggingFaceWeights(Path(source))
    table = stored_parameters(weights.architecture)
    dtypes = _dtypes(weights, table, dtype)
    files = _cut(table, dtypes, file_bytes)
    sizes = [sum(_size(stored, dtypes) for stored in file) for file in files]
    sources = left_out_tensors(source, weights.architecture)
    left_out = describe(sources)
    copied_bytes = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in left_out.values())
    plan = {"to": MEGATRON, "source": weights.marks(), "dtype": str(dtype), "file_bytes": file_bytes}
    with Partial(Path(target), plan, sum(sizes) + copied_bytes, advance) as partial:
        writer = FileSystemWriter(partial.path / MEGATRON)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        plans = [_plan(file, dtypes) for file in files]
        plans[0].items.append(WriteItem(MetadataIndex(COMMON), WriteItemType.BYTE_IO))
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(plan) for plan in plans])
        plans = writer.prepare_global_plan(plans)
        results: list[list[WriteResult]] = []
        for number, (save_plan, file) in enumerate(zip(plans, files, strict=True)):
            done = partial.note(number)
            if done.is_file():
                partial.wrote(sizes[number])
            else:
                written = writer.write_data(save_plan, _FromHuggingFace(weights, file, dtypes, partial.wrote)).value()
                write_atomically(done, pickle.dumps(written))
            results.append(pickle.loads(done.read_bytes()))
        writer.finish(metadata, results)
        if (partial.path / LEFT_OUT).is_file():
            partial.wrote(copied_bytes)
        elif left_out:
            copied(partial.path / LEFT_OUT, left_out, sources, partial.wrote)
        if weights.joined_experts:
            (partial.path / MARK).touch()
        save_config(CheckpointingConfig("torch_dist", 1), str(partial.path / MEGATRON))
        write_config(weights.origin, partial.path, _name(dtypes))
        copy_companions(weights.origin, partial.path)
        partial.finish(lambda: _account(partial.path, table, dtypes, left_out))


class _FromHuggingFace(DefaultSavePlanner):
    """Reads the pieces of one file when they are written, and reports their bytes to `wrote`."""

    def __init__(
        self,
        weights: HuggingFaceWeights,
        file: list[StoredParameter],
        dtypes: dict[str, torch.dtype],
        wrote: Callable[[int], None],
    ):
        super().__init__()
        self._weights = weights
        self._dtypes = dtypes
        self._wrote = wrote
        self._places = {(tensor.key, tensor.index): (stored, tensor) for stored in file for tensor in stored.tensors}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the piece's data: [1, ..., 1, rows, columns]."""
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([{}], buffer)
            return buffer
        key, offset = write_item.index.fqn, tuple(write_item.index.offset or ())
        stored, tensor = next(
            self._places[key, offset[:ahead]] for ahead in (2, 1, 0) if (key, offset[:ahead]) in self._places
        )
        within = offset[len(stored.index) :]
        tensors = self._weights.tensors(stored)
        pieces = stored.pieces
        value = (
            stored.parameter.rule.merge(tensors) if len(pieces) == 1 else tensors[[p[0] for p in pieces].index(within)]
        )
        if tensor is not stored:
            keys = [section.key for section in stored.tensors]
            value = value.split([section.shape[0] for section in stored.tensors])[keys.index(key)]
        chunk = required(write_item.tensor_data, "the place of a tensor's piece").chunk
        value = value.to(self._dtypes[key]).view(chunk.sizes)
        self._wrote(value.nbytes)
        return value


def _plan(file: list[StoredParameter], dtypes: dict[str, torch.dtype]) -> SavePlan:
    return SavePlan(
        [item for stored in file for tensor in stored.tensors for item in _items(tensor, dtypes[tensor.key])]
    )


def _items(stored: StoredParameter, dtype: torch.dtype) -> Iterator[WriteItem]:
    ahead = (1,) * len(stored.index)
    for offset, shape in stored.pieces:
        chunk = ChunkStorageMetadata(torch.Size(stored.index + offset), torch.Size(ahead + shape))
        data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(stored.counts + stored.shape))
        yield WriteItem(MetadataIndex(stored.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _dtypes(
    weights: HuggingFaceWeights, table: list[StoredParameter], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the metadata of each of Megatron's tensors, which contain all layers."""
    found: dict[str, torch.dtype] = {}
    for stored in table:
        wanted = weights.dtype(stored) if dtype is None or stored.parameter.keeps_dtype else dtype
        for key in (tensor.key for tensor in stored.tensors):
            if found.setdefault(key, wanted) != wanted:
                raise UserError(
                    f"{weights.origin}: {stored.parameter.hf_names[0]} is {wanted}, other layers' are {found[key]}; "
                    f"give --dtype."
                )
    return found


def _cut(table: list[StoredParameter], dtypes: dict[str, torch.dtype], file_bytes: int) -> list[list[StoredParameter]]:
    files: list[list[StoredParameter]] = [[]]
    filled = 0
    for stored in table:
        size = _size(stored, dtypes)
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(stored)
        filled += size
    return files


def _size(stored: StoredParameter, dtypes: dict[str, torch.dtype]) -> int:
    return torch.Size(stored.shape).numel() * dtypes[stored.tensors[0].key].itemsize


def _name(dtypes: dict[str, torch.dtype]) -> str:
    """Return the model's dtype in config.json: that of its matrices."""
    return str(dtypes["embedding.word_embeddings.weight"]).removeprefix("torch.")


def _account(
    directory: Path, table: list[StoredParameter], dtypes: dict[str, torch.dtype], left_out: Described
) -> None:
    """Read the written files independently and check name, shape and dtype of every parameter."""
    if left_out and describe(dict.fromkeys(headers([directory / LEFT_OUT]), directory / LEFT_OUT)) != left_out:
        raise UserError(f"{directory / LEFT_OUT} was not written as it should have been; convert again.")
    files = MegatronFiles(directory / MEGATRON, read_architecture(directory))
    for stored in table:
        key = stored.tensors[0].key
        if files.dtype(stored) != dtypes[key]:
            raise UserError(f"{directory}: {key} was written as {files.dtype(stored)}, not {dtypes[key]}.")
