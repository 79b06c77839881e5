"""Compares two forms of one model: every tensor, and the logits of Megatron's model with transformers'."""

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import psutil
import torch

from exprl_megatron.conversion.safetensors_files import headers, read_tensor
from exprl_megatron.conversion.to_hf import Form
from exprl_megatron.conversion.weights import HuggingFaceWeights, MegatronWeights, Weights, open_weights
from exprl_megatron.errors import UserError
from exprl_megatron.models import fp8_blocks as fp8
from exprl_megatron.models.left_out import left_out_tensors
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.stored_parameters import StoredParameter, stored_parameters
from exprl_megatron.models.weight_readers import weight_files
from exprl_megatron.policy.megatron_files import MEGATRON
from exprl_megatron.utils.required import required

TOKENS = 64
"""Random tokens whose logits are compared."""
TOLERANCE = 1e-4
"""Largest difference of two logits, as a share of the largest logit."""


@dataclass
class Verified:
    """The result of a comparison."""

    hashes: dict[str, dict] = field(default_factory=dict)
    """SHA-256, shape and dtype of each of the copy's tensors."""
    differing: list[str] = field(default_factory=list)
    note: str = ""
    """Conversion of the reference before the comparison, if any."""
    logits: str = ""
    """The result for the logits, or why they were not compared."""
    logits_agree: bool = True

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differing and self.logits_agree

    def lines(self) -> list[str]:
        """Return the result as lines of text."""
        count = len(self.hashes)
        equal = len(self.hashes.keys() - set(self.differing))
        said = [f"{equal} of {count} tensors are bit-equal{self.note}."]
        said += [f"differs: {name}" for name in self.differing[:20]]
        if len(self.differing) > 20:
            said.append(f"... and {len(self.differing) - 20} more.")
        return [*said, f"Logits: {self.logits}."]


def verify_weights(
    reference: Path,
    copy: Path,
    origin: Path | None = None,
    logits: Literal["auto", "yes", "no"] = "auto",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Compare `copy` with `reference`, each in any form (see open_weights).

    Where the copy was written in another dtype, or quantized, the reference is converted to that form first. `advance`
    receives the reference's bytes done and in all.

    Raises:
        UserError: one of them is incomplete, or they are of different architectures.
    """
    expected = open_weights(reference, origin)
    quantized = _quantized(Path(copy))
    made = None if quantized else open_weights(copy, origin)
    if quantized:
        _check_config(Path(copy), expected)
    elif required(made, "the copy").architecture != expected.architecture:
        raise UserError(f"{copy} and {reference} are models of different architectures; compare two of the same.")
    found = Verified()
    table = [stored for stored in stored_parameters(expected.architecture) if stored.parameter.exported]
    sizes = [prod(stored.shape) * expected.dtype(stored).itemsize for stored in table]
    for number, stored in enumerate(table):
        if quantized:
            form, given = Form(hf_shapes(expected.architecture), "fp8"), _read_quantized(quantized, stored)
        else:
            weights = required(made, "the copy")
            form = Form(hf_shapes(expected.architecture), weights.dtype(stored))
            given = dict(zip(stored.parameter.hf_names, weights.tensors(stored), strict=True))
            if expected.dtype(stored) != weights.dtype(stored):
                found.note = " with the reference cast to the copy's dtype"
        _compare(found, dict(form.tensors(expected, stored)), given)
        advance(sum(sizes[: number + 1]), sum(sizes))
    pairs = [left_out_tensors(path, expected.architecture) for path in (expected.origin, made.origin if made else copy)]
    for name in sorted(pairs[0].keys() | pairs[1].keys()):
        _compare(found, *({name: read_tensor(files[name], name)} if name in files else {} for files in pairs))
    if quantized:
        found.note = " with the reference quantized alike"
        found.differing += sorted(quantized.keys() - found.hashes.keys())
    _compare_logits(found, expected, made, logits)
    return found


def _compare(found: Verified, expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    for name in expected.keys() | given.keys():
        described = [_described(tensors[name]) if name in tensors else None for tensors in (expected, given)]
        if described[1] is not None:
            found.hashes[name] = described[1]
        if described[0] != described[1]:
            found.differing.append(name)


def _described(tensor: torch.Tensor) -> dict:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"sha256": hashlib.sha256(content).hexdigest(), "shape": list(tensor.shape), "dtype": dtype}


def _quantized(directory: Path) -> dict[str, Path]:
    """Return the files of a block-quantized model's tensors; empty where it is none."""
    # Tensors that are left out are next to Megatron's files, in a file of their own.
    if (directory / MEGATRON).is_dir() or not any(directory.glob("*.safetensors")):
        return {}
    found = headers(weight_files(directory))
    return {name: path for name, (path, _, _) in found.items()} if any(n.endswith(fp8.SCALE) for n in found) else {}


def _check_config(directory: Path, expected: Weights) -> None:
    """Check that config.json of a quantized model is the original's, except for its dtype, and says how it is
    quantized.
    """
    given, wanted = (
        json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (directory, expected.origin)
    )
    wanted["quantization_config"] = fp8.quantization_config(
        list(hf_shapes(expected.architecture)), list(left_out_tensors(expected.origin, expected.architecture))
    )
    keys = (given.keys() | wanted.keys()) - {"dtype", "torch_dtype"}
    if differing := sorted(key for key in keys if given.get(key) != wanted.get(key)):
        raise UserError(
            f"{directory}/config.json is not that of {expected.origin} quantized ({', '.join(differing)}); "
            f"compare two forms of one model."
        )


def _read_quantized(files: dict[str, Path], stored: StoredParameter) -> dict[str, torch.Tensor]:
    names = [name + suffix for name in stored.parameter.hf_names for suffix in ("", fp8.SCALE)]
    return {name: read_tensor(files[name], name) for name in names if name in files}


def _compare_logits(found: Verified, expected: Weights, made: Weights | None, wanted: str) -> None:
    if wanted == "no" or made is None or not isinstance(expected, HuggingFaceWeights):
        found.logits = "not compared" + (
            "" if wanted == "no" else ", that needs an unquantized copy of a model directory"
        )
        return
    needed = 2.5 * 4 * sum(torch.Size(shape).numel() for shape in hf_shapes(expected.architecture).values())
    free = psutil.virtual_memory().available
    if wanted == "auto" and needed > 0.8 * free:
        found.logits = f"not compared, both models need {needed / 1e9:.0f} GB and {free / 1e9:.0f} are free"
        return
    tokens = torch.randint(expected.architecture.vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    theirs = _logits_of_transformers(expected.origin, tokens)
    gc.collect()
    ours = _logits_of_megatron(made, tokens)
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    found.logits_agree = difference <= TOLERANCE * largest
    found.logits = (
        f"Megatron's and transformers' differ by at most {difference:.1e} (largest logit {largest:.1f}, fp32, "
        f"{TOKENS} tokens)"
    )


@torch.no_grad()
def _logits_of_transformers(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(tokens).logits


@torch.no_grad()
def _logits_of_megatron(made: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Return [1, tokens, vocabulary] of the model that a single rank builds and loads, on the CPU in fp32."""
    from exprl_megatron.config.policy import Layout, PolicyConfig
    from exprl_megatron.policy.huggingface import load_huggingface
    from exprl_megatron.policy.megatron_loading import load_files
    from exprl_megatron.policy.model import build_chunks
    from exprl_megatron.policy.world import enter_world, leave_world

    world = enter_world(Layout())
    try:
        config = PolicyConfig(model=str(made.origin))
        chunks = build_chunks(made.architecture, config, world)
        if isinstance(made, MegatronWeights):
            load_files(chunks, made.files.directory)
        else:
            load_huggingface(chunks, made.architecture, world, made.origin)
        positions = torch.arange(tokens.shape[1])[None]
        logits = chunks[0](tokens.to(world.device), positions.to(world.device), None)
        return logits.float().cpu()[..., : made.architecture.vocabulary]
    finally:
        leave_world()
