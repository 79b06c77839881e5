"""Whether a server could serve a model directory: seen from its config, its files' headers and the server's ranks.

SGLang would find most of this minutes later, with a traceback; and it serves what is missing as random numbers.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, read_architecture
from exprl_megatron.models.joined_experts import pieces
from exprl_megatron.models.left_out import LEFT_OUT
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.served_policy import division_faults
from exprl_megatron.models.weight_readers import INDEX, weight_files

_SHARD = re.compile(r"(.+-)(\d+)(-of-)(\d+)(\.safetensors)")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
"""Files that transformers makes a tokenizer of. A directory with code of its own for it, `tokenization_*.py`, may have
others."""


def check_served_model(directory: Path, server: str, config: ServerConfig, cuda: bool) -> None:
    """Check that the server named `server` could serve `directory`; of weights the headers are read.

    A model of an unknown family, or one that is quantized, may have any tensors, and any layout.

    Raises:
        UserError: it could not.
    """
    quantization = _config(directory, server).get("quantization_config")
    if not cuda and isinstance(quantization, dict) and quantization.get("quant_method") == "fp8":
        raise UserError(
            f"{directory}, the model of {server}, is quantized in fp8, which servers on a machine without GPUs do not "
            f"compute; give the model in bf16."
        )
    names = _tensor_names(directory, server)
    if not _has_tokenizer(directory, config):
        raise UserError(
            f"{directory}, the model of {server}, has no tokenizer ({', '.join(_TOKENIZERS[:3])}); put it there."
        )
    try:
        architecture = read_architecture(directory)
    except UserError:
        # A judge may be of any model that SGLang serves.
        return
    if missing := _missing(names, architecture):
        raise UserError(
            f"{directory}, the model of {server}, lacks tensor {missing[0]} ({len(missing)} such), which SGLang would "
            f"serve as random numbers; fetch the model again."
        )
    if not config.divides_otherwise:
        for fault in division_faults(architecture, config.tp, str(directory), cuda):
            raise UserError(f"The tp of {server} is {config.tp}, which {fault}")


def _config(directory: Path, server: str) -> dict:
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}, the model of {server}, has no config.json; give a directory in Hugging Face form."
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}, of the model of {server}, is no JSON object ({error}); fetch it again.") from error


def _tensor_names(directory: Path, server: str) -> set[str]:
    """Return the names of all tensors in the files that SGLang would load."""
    names = {name for path in _weight_files(directory, server) for name in _header(path)}
    if not names:
        raise UserError(f"{directory}, the model of {server}, has no tensor in its *.safetensors; fetch it again.")
    if (directory / INDEX).is_file():
        indexed = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if lost := sorted(indexed.keys() - names):
            raise UserError(
                f"{directory}, the model of {server}, lacks tensor {lost[0]} ({len(lost)} such), which {INDEX} names; "
                f"fetch the model again."
            )
    return names


def _header(path: Path) -> dict[str, dict]:
    """Return what a safetensors file says of each of its tensors, by name; see the section Format of
    https://github.com/huggingface/safetensors.

    Its library would import torch or numpy for this, which a launcher does without.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(length)) if length <= size else None
        if not isinstance(header, dict):
            raise ValueError("its header is incomplete")
        header.pop("__metadata__", None)
        if size != 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0):
            raise ValueError("its size is not the one that its header says")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); fetch the model again.") from error
    return header


def _weight_files(directory: Path, server: str) -> list[Path]:
    if (directory / INDEX).is_file():
        return weight_files(directory)
    there = {path.name for path in directory.glob("*.safetensors")}
    if there == {LEFT_OUT}:
        raise UserError(
            f"{directory}, the model of {server}, has no weights: {LEFT_OUT} is what a policy has no use for; export "
            f"the model to Hugging Face form (tools/convert_checkpoint.py)."
        )
    if not there:
        raise UserError(f"{directory}, the model of {server}, has no *.safetensors; put the weights there.")
    for name in sorted(there):
        if shard := _SHARD.fullmatch(name):
            begin, number, of, count, end = shard.groups()
            every = {f"{begin}{n:0{len(number)}}{of}{count}{end}" for n in range(1, int(count) + 1)}
            if lost := sorted(every - there):
                raise UserError(f"{directory}, the model of {server}, lacks {lost[0]}; fetch the model again.")
    return [directory / name for name in sorted(there - {LEFT_OUT})]


def _has_tokenizer(directory: Path, config: ServerConfig) -> bool:
    if config.extra_options & {"--tokenizer-path", "--skip-tokenizer-init"}:
        return True
    return any(any(directory.glob(pattern)) for pattern in (*_TOKENIZERS, "tokenization_*.py"))


def _missing(names: Collection[str], architecture: Architecture) -> list[str]:
    return sorted(hf_shapes(architecture).keys() - set(names) - pieces(names, architecture).keys())
