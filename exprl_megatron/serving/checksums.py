"""The checksums that an SGLang server reports, computed from Hugging Face-named tensors.

SGLang 0.5.23 hashes each parameter as it holds it: query, key and value projections joined along the
rows, gate and up projections too, the vocabulary padded with zero rows to a multiple of 64. For one
tensor-parallel rank and unquantised weights those bytes follow from the Hugging Face tensors alone. On a
CPU the hash is SHA-256 cut to 8 bytes, on CUDA a sum of mixed 32-bit words (see `_word_hash`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PARTS = {part: fused for fused, parts in _FUSED.items() for part in parts}
_PADDED = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64
_MASK = 0xFFFFFFFF
_TILE = 8192
_TILES_AT_ONCE = 256
_SEED = 0x243F6A88


def checksums(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tied: bool,
    dtype: torch.dtype | None = None,
    server: Literal["cpu", "cuda"] = "cpu",
) -> dict[str, str]:
    """What `SGLangClient.checksums` returns for a server that holds these weights, under SGLang's names.

    Tensors may come in any order, on any device; those of a fused parameter are kept until it is
    complete. `tied`: the model has tie_word_embeddings, so that an `lm_head.weight` is left out.
    `dtype`: the server's, where the tensors have another. `server`: what the server runs on.

    Raises ValueError where a part of a fused parameter never came.
    """
    found = {}
    for name, parts in _fuse(named_tensors):
        if tied and name == "lm_head.weight":
            continue
        parts = [part.detach().to(dtype=dtype or part.dtype).contiguous() for part in parts]
        if name in _PADDED:
            parts.append(_padding(parts[0]))
        as_bytes = [part.reshape(-1).view(torch.uint8) for part in parts]
        found[name] = _sha256(as_bytes) if server == "cpu" else _word_hash(torch.cat(as_bytes))
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
    """The first 8 bytes of SHA-256 over `parts` (uint8), in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(memoryview(part.cpu().numpy()))
    return digest.hexdigest()[:16]


def _word_hash(data: torch.Tensor) -> str:
    """SGLang's hash of a CUDA tensor, of `data` (uint8) on any device.

    Every 32-bit word is mixed with its index, twice with different constants, and summed over tiles of
    8192 words; the tiles' two sums, finalised, are summed as one 64-bit number and mixed once more. Words
    are held in int64; a product that overflows keeps its low 32 bits right.
    """
    count = -(-data.numel() // 4)
    if count == 0:
        return f"{0:016x}"
    words = torch.nn.functional.pad(data, (0, -data.numel() % (4 * _TILE))).view(torch.int32).view(-1, _TILE)
    second_seed = (_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _MASK
    total = 0
    for first, tiles in zip(range(0, len(words), _TILES_AT_ONCE), words.split(_TILES_AT_ONCE), strict=True):
        tiles = tiles.to(torch.int64) & _MASK
        index = torch.arange(first * _TILE, first * _TILE + tiles.numel(), device=tiles.device).view_as(tiles)
        inside, index = index < count, index & _MASK
        for shift, factor, seed, turn in ((32, 0x27D4EB2D, _SEED, 15), (0, 0x165667B1, second_seed, 13)):
            place = ((index * factor + seed) & _MASK) ^ (((index << turn) | (index >> (32 - turn))) & _MASK)
            mixed = torch.where(inside, _finalise(tiles ^ place), 0)
            total += int((_finalise((mixed.sum(dim=1) ^ (count * 4)) & _MASK) << shift).sum())
    return f"{_splitmix64(total & (1 << 64) - 1):016x}"


def _finalise(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's last step on 32-bit words."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return x ^ x >> 31
