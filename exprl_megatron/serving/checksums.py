"""The checksums that an SGLang server reports, computed from Hugging Face-named tensors.

SGLang 0.5.23 hashes each parameter as it holds it: query, key and value projections joined along the
rows, gate and up projections too, the vocabulary padded with zero rows to a multiple of 64. For one tensor-parallel
rank and unquantised weights those bytes follow from the Hugging Face tensors alone.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PARTS = {part: fused for fused, parts in _FUSED.items() for part in parts}
_PADDED = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64


def checksums(
    named_tensors: Iterable[tuple[str, torch.Tensor]], *, tied: bool, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """What `SGLangClient.checksums` returns for a CPU server that holds these weights, under SGLang's names.

    Tensors may come in any order, on any device; at most the parts of a few fused ones are held at a time. `tied`:
    the model has tie_word_embeddings, so that an `lm_head.weight` is left out. `dtype`: the
    server's, where the tensors have another.

    Raises ValueError where a part of a fused parameter never came.
    """
    found = {}
    for name, parts in _fuse(named_tensors):
        if tied and name == "lm_head.weight":
            continue
        parts = [part.detach().to("cpu", dtype or part.dtype).contiguous() for part in parts]
        if name in _PADDED:
            parts.append(_padding(parts[0]))
        found[name] = _sha256(parts)
    return found


def differing(held: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Names, in order, whose checksum is not the same in both or which only one of them has."""
    return sorted(name for name in held.keys() | expected.keys() if held.get(name) != expected.get(name))


def _fuse(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Each parameter of SGLang with the tensors whose rows, one after the other, are its rows."""
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named_tensors:
        module, _, part = name.rpartition(".")[0].rpartition(".")
        fused = _PARTS.get(part)
        if fused is None:
            yield name, [tensor]
            continue
        fused_name = f"{module}.{fused}.{name.rpartition('.')[2]}"
        parts = waiting.setdefault(fused_name, {})
        parts[part] = tensor
        if len(parts) == len(_FUSED[fused]):
            yield fused_name, [parts[p] for p in _FUSED[fused]]
            del waiting[fused_name]
    if waiting:
        missing = [f"{name} (has {', '.join(parts)})" for name, parts in waiting.items()]
        raise ValueError(f"parts of fused parameters are missing: {'; '.join(missing)}")


def _padding(embedding: torch.Tensor) -> torch.Tensor:
    rows = -embedding.shape[0] % _VOCABULARY_MULTIPLE
    return embedding.new_zeros((rows, embedding.shape[1]))


def _sha256(parts: list[torch.Tensor]) -> str:
    """The first 8 bytes of SHA-256 over the bytes of `parts`, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(memoryview(part.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]
