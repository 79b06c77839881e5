"""The checksums that an SGLang server reports, computed from Hugging Face-named tensors.

SGLang 0.5.23 hashes each parameter as each tensor-parallel rank holds it: its parts of the query, key and value
projections joined along the rows, of the gate and up projections too, the vocabulary padded with zero rows to a
multiple of 64 and cut by rows, output and down projections cut by columns, the rest whole. FP8 weights are hashed as
the bf16 numbers that they stand for. On a CPU the hash is SHA-256 cut to 8 bytes, on CUDA a sum of mixed 32-bit words
(see `_word_hash`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_PARTS = {part: fused for fused, parts in _FUSED.items() for part in parts}
_BY_ROWS = (*_PARTS, "embed_tokens", "lm_head")
_BY_COLUMNS = ("o_proj", "down_proj")
_PADDED = ("model.embed_tokens.weight", "lm_head.weight")
_VOCABULARY_MULTIPLE = 64
_MLP = ("gate_proj", "up_proj", "down_proj")
_CPU_MLP_MULTIPLE = 32
"""On a CPU each of several ranks holds a multiple of so many of an MLP's inner numbers, the last ones zero."""
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
    """`rank_checksums` for a server of one tensor-parallel rank."""
    return rank_checksums(named_tensors, tp=1, kv_heads=1, tied=tied, dtype=dtype, server=server)[0]


def rank_checksums(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tp: int,
    kv_heads: int,
    tied: bool,
    dtype: torch.dtype | None = None,
    server: Literal["cpu", "cuda"] = "cpu",
) -> tuple[dict[str, str], ...]:
    """What `SGLangClient.checksums` returns for a server that holds these weights, under SGLang's names.

    Tensors may come in any order, on any device; those of a fused parameter are kept until it is
    complete. `kv_heads`: the model's; where `tp` is more, ranks share them. `tied`: the model has tie_word_embeddings,
    so that an `lm_head.weight` is left out. `dtype`: the server's, where the tensors have another. `server`: what the
    server runs on.

    Raises ValueError where a part of a fused parameter never came.
    """
    found: tuple[dict[str, str], ...] = tuple({} for _ in range(tp))
    for name, parts in _fuse(named_tensors):
        if tied and name == "lm_head.weight":
            continue
        whole = {part: tensor.detach().to(dtype=dtype or tensor.dtype) for part, tensor in parts.items()}
        if name in _PADDED:
            whole = {part: torch.cat([tensor, _padding(tensor)]) for part, tensor in whole.items()}
        for rank, held in enumerate(found):
            own = [_rank_part(part, tensor, rank, tp, kv_heads, server).contiguous() for part, tensor in whole.items()]
            as_bytes = [part.reshape(-1).view(torch.uint8) for part in own]
            held[name] = _sha256(as_bytes) if server == "cpu" else _word_hash(torch.cat(as_bytes))
    return found


def differing(held: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Names, in order, whose checksum is not the same in both or which only one of them has."""
    return sorted(name for name in held.keys() | expected.keys() if held.get(name) != expected.get(name))


def _split(part: str) -> int | None:
    """The dimension along which ranks cut the tensors of the module `part` (q_proj, embed_tokens, ...)."""
    return 0 if part in _BY_ROWS else 1 if part in _BY_COLUMNS else None


def _rank_part(part: str, tensor: torch.Tensor, rank: int, tp: int, kv_heads: int, server: str) -> torch.Tensor:
    dim = _split(part)
    if dim is None or tp == 1:
        return tensor
    if part in ("k_proj", "v_proj") and kv_heads < tp:
        rank, tp = rank * kv_heads // tp, kv_heads
    multiple = tp * _CPU_MLP_MULTIPLE if server == "cpu" and part in _MLP else tp
    size = -(-tensor.shape[dim] // multiple) * multiple // tp
    start = min(rank * size, tensor.shape[dim])
    held = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
    padding = [*held.shape]
    padding[dim] = size - held.shape[dim]
    return torch.cat([held, held.new_zeros(padding)], dim) if padding[dim] else held


def _fuse(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each parameter of SGLang with the tensors, by module, whose rows, one after the other, are its rows."""
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named_tensors:
        module, _, part = name.rpartition(".")[0].rpartition(".")
        fused = _PARTS.get(part)
        if fused is None:
            yield name, {part: tensor}
            continue
        fused_name = f"{module}.{fused}.{name.rpartition('.')[2]}"
        parts = waiting.setdefault(fused_name, {})
        parts[part] = tensor
        if len(parts) == len(_FUSED[fused]):
            yield fused_name, {p: parts[p] for p in _FUSED[fused]}
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
