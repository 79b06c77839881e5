"""Loads and saves model directories in Hugging Face form, in any layout."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.joined_experts import Joiner
from exprl_megatron.models.left_out import left_out_tensors
from exprl_megatron.models.name_map import HEAD, embedding, hf_shapes, parameters
from exprl_megatron.models.rules import Rule, spans
from exprl_megatron.models.weight_readers import (
    INDEX,
    SINGLE,
    RandomWeights,
    Safetensors,
    has_joined_experts,
    open_safetensors,
    read_parts,
)
from exprl_megatron.policy.gather import gather_buckets
from exprl_megatron.policy.gloo_group import broadcast_from_rank
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.precision import set_parameter
from exprl_megatron.policy.world import World

SHARD_BYTES = 4 * 2**30
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files that are copied from the original model: tokenizer and generation settings."""


def load_huggingface(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, world: World, directory: str | Path
) -> None:
    """Fill this rank's parameters from the safetensors in `directory`, reading only what they need.

    Values are converted to the parameters' dtype. Raises UserError where the directory has no weights, a
    truncated file, or a tensor too many, too few or of another shape than config.json says.
    """
    with Safetensors(directory, architecture) as source:
        _fill(chunks, architecture, world, source)
        if architecture.tied:
            _check_tied(source, directory, architecture, world)


def initialize(chunks: Sequence[torch.nn.Module], architecture: Architecture, world: World, seed: int) -> None:
    """Fill this rank's parameters with fresh weights, the same model for every layout."""
    with RandomWeights(architecture, seed) as source:
        _fill(chunks, architecture, world, source)


def save_huggingface(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    world: World,
    origin: str | Path,
    directory: str | Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model as `directory`: safetensors (several with an index above `shard_bytes`), config, tokenizer.

    A collective; config, tokenizer files and the tensors that a policy is without are taken from `origin`. The
    directory appears, complete, by one rename, and is refused where it exists.

    Raises:
        UserError: it cannot be written; on every rank.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".tmp")
    problem: list[str | None] = [None]
    written: list[dict[str, int]] = []
    if world.rank == 0:
        problem[0] = _attempt(_begin, directory, partial)
    joiner = Joiner(architecture) if has_joined_experts(Path(origin), architecture) else None
    for bucket in gather_buckets(chunks, architecture, world, shard_bytes):
        if world.rank == 0 and problem[0] is None:
            complete = bucket if joiner is None else joiner.add(bucket)
            problem[0] = _attempt(_add_shard, partial, written, complete) if complete else None
    if world.rank == 0 and problem[0] is None:
        problem[0] = _attempt(_copy_left_out, left_out_tensors(origin, architecture), partial, written, shard_bytes)
    if world.rank == 0 and problem[0] is None:
        problem[0] = _attempt(_finish, directory, partial, Path(origin), written, _dtype(chunks))
    if world.rank == 0 and problem[0] is not None and partial.exists():
        shutil.rmtree(partial, ignore_errors=True)
    if (found := broadcast_from_rank(0, problem[0])) is not None:
        raise UserError(f"The model cannot be written to {directory}: {found}; choose another place or make room.")


def write_config(origin: Path, directory: Path, dtype: str, **changes) -> None:
    """Write `origin`'s config.json into `directory`, with the weights' dtype and `changes` in it."""
    config = json.loads((origin / "config.json").read_text(encoding="utf-8"))
    # A vision model also states it for its language model.
    for section in (config, config.get("text_config")):
        if section is config or (section and {"dtype", "torch_dtype"} & section.keys()):
            section["torch_dtype" if "torch_dtype" in section else "dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config | changes, indent=2) + "\n", encoding="utf-8")


def copy_companions(origin: Path, directory: Path) -> None:
    """Copy tokenizer and generation settings."""
    for name in COMPANIONS:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, directory / name)


@torch.no_grad()
def _fill(
    chunks: Sequence[torch.nn.Module], architecture: Architecture, world: World, source: Safetensors | RandomWeights
) -> None:
    shapes, layout = hf_shapes(architecture), world.layout
    empty = {(index, name): p for index, chunk in enumerate(chunks) for name, p in named_weights(chunk)}
    for entry in parameters(architecture, layout, grouped=world.device.type == "cuda"):
        if entry.pp_rank != world.pp_rank or entry.ep_rank not in (None, world.ep_rank):
            continue
        parameter = empty.pop((entry.chunk, entry.name))
        rank, ranks = (world.tp_rank, layout.tp) if entry.ep_rank is None else (world.etp_rank, layout.etp)
        value = entry.rule.merge(read_parts(source, entry, shapes, rank, ranks))
        if value.shape != parameter.shape:
            raise ValueError(f"{entry.name}: the table gives shape {tuple(value.shape)}, Megatron {parameter.shape}")
        set_parameter(parameter, value)
    if empty:
        raise ValueError(f"the table of names does not know the parameters {sorted(empty)}")


def _check_tied(source: Safetensors, directory: str | Path, architecture: Architecture, world: World) -> None:
    """Refuse an output layer that differs from the tied embedding: it would be lost silently."""
    if not source.has(HEAD):
        return
    tied = embedding(architecture)
    (span,) = spans(Rule(split_dim=0), 0, architecture.vocabulary, world.tp_rank, world.layout.tp)
    head, own = (source.read(name, 0, *span) for name in (HEAD, tied))
    if not torch.equal(head, own):
        raise UserError(
            f"{directory} ties its embeddings but {HEAD} differs from {tied}; "
            f"set tie_word_embeddings to false in its config.json."
        )


def _attempt(action: Callable[..., None], *arguments) -> str | None:
    """Run `action`; return the reason, in a few words, where the file system refused."""
    try:
        action(*arguments)
    except OSError as error:
        return error.strerror or str(error)
    except (UserError, SafetensorError) as error:
        return str(error)
    return None


def _begin(directory: Path, partial: Path) -> None:
    if directory.exists():
        raise UserError("it exists already")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_shard(partial: Path, number: int, bucket: list[tuple[str, torch.Tensor]]) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in bucket}
    save_file(tensors, partial / f"shard-{number}", metadata={"format": "pt"})


def _copy_left_out(found: dict[str, Path], partial: Path, written: list[dict[str, int]], shard_bytes: int) -> None:
    """Add shards with the tensors of `found`, each with the file that it is in."""
    bucket: list[tuple[str, torch.Tensor]] = []
    for name, path in found.items():
        with open_safetensors(path) as file:
            tensor = file.get_tensor(name)
        if bucket and sum(held.nbytes for _, held in bucket) + tensor.nbytes > shard_bytes:
            _add_shard(partial, written, bucket)
            bucket = []
        bucket.append((name, tensor))
    if bucket:
        _add_shard(partial, written, bucket)


def _add_shard(partial: Path, written: list[dict[str, int]], bucket: list[tuple[str, torch.Tensor]]) -> None:
    _write_shard(partial, len(written), bucket)
    written.append({name: tensor.nbytes for name, tensor in bucket})


def _finish(directory: Path, partial: Path, origin: Path, written: list[dict[str, int]], dtype: str) -> None:
    """Give the shards their final names, add index, config and tokenizer, and rename the directory."""
    names = [SINGLE]
    if len(written) > 1:
        names = [f"model-{number + 1:05d}-of-{len(written):05d}.safetensors" for number in range(len(written))]
        total = sum(sum(sizes.values()) for sizes in written)
        weight_map = {tensor: name for name, sizes in zip(names, written, strict=True) for tensor in sizes}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for number, name in enumerate(names):
        (partial / f"shard-{number}").rename(partial / name)
    write_config(origin, partial, dtype)
    copy_companions(origin, partial)
    partial.rename(directory)


def _dtype(chunks: Sequence[torch.nn.Module]) -> str:
    return str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
