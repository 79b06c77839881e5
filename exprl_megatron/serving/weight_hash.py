"""The hashes that SGLang 0.5.23 reports of its weights, of bytes that come piece by piece.

On a CPU it is SHA-256 cut to 8 bytes; on CUDA a sum of mixed 32-bit words (sglang.kernels.ops.memory.gpu_tensor_hash).
"""

import hashlib
from typing import Protocol

import torch

from exprl_megatron.serving.tensor_bytes import tensor_bytes

_MASK = 0xFFFFFFFF
_TILE = 8192
_TILES_AT_ONCE = 256
_SEED = 0x243F6A88


class WeightHash(Protocol):
    """The hash of one tensor."""

    def update(self, data: torch.Tensor) -> None:
        """Add `data` ([n] uint8, on any device) to the hash."""

    def hexdigest(self) -> str:
        """Return the hash of all data so far."""


class Sha256:
    """The first 8 bytes of SHA-256, in hexadecimal."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def update(self, data: torch.Tensor) -> None:
        """Continue with `data`, uint8 [n], on any device."""
        self._digest.update(tensor_bytes(data.cpu().contiguous()))

    def hexdigest(self) -> str:
        """Return the hash of all data so far."""
        return self._digest.hexdigest()[:16]


class WordHash:
    """SGLang's hash of a CUDA tensor of `nbytes`.

    Every 32-bit word is mixed with its index, twice with different constants, and summed over tiles of
    8192 words; the tiles' two sums, finalised, are summed as one 64-bit number and mixed once more. Words
    are held in int64; a product that overflows keeps its low 32 bits right.
    """

    def __init__(self, nbytes: int):
        self._words = -(-nbytes // 4)
        self._hashed = 0
        self._total = 0
        self._left: torch.Tensor | None = None
        """What came since the last whole tile."""

    def update(self, data: torch.Tensor) -> None:
        """Continue with `data`, uint8 [n], on any device."""
        if self._left is not None:
            data = torch.cat([self._left, data])
        whole = len(data) - len(data) % (4 * _TILE)
        self._add(data[:whole])
        self._left = data[whole:].clone()

    def hexdigest(self) -> str:
        """Return the hash of all data; nothing may be added after it."""
        if self._words == 0:
            return f"{0:016x}"
        if self._left is not None:
            self._add(torch.nn.functional.pad(self._left, (0, -len(self._left) % (4 * _TILE))))
            self._left = None
        return f"{_splitmix64(self._total & (1 << 64) - 1):016x}"

    def _add(self, data: torch.Tensor) -> None:
        """Add whole tiles; words past the tensor's end count nothing."""
        if data.storage_offset() % 4:
            data = data.clone()  # a view of words must begin at one
        for tiles in data.view(torch.int32).view(-1, _TILE).split(_TILES_AT_ONCE):
            tiles = tiles.to(torch.int64) & _MASK
            index = torch.arange(self._hashed, self._hashed + tiles.numel(), device=tiles.device).view_as(tiles)
            self._hashed += tiles.numel()
            inside, index = index < self._words, index & _MASK
            for shift, factor, seed, turn in ((32, 0x27D4EB2D, _SEED, 15), (0, 0x165667B1, _SECOND_SEED, 13)):
                place = ((index * factor + seed) & _MASK) ^ (((index << turn) | (index >> (32 - turn))) & _MASK)
                mixed = torch.where(inside, _finalise(tiles ^ place), 0)
                self._total += int((_finalise((mixed.sum(dim=1) ^ (self._words * 4)) & _MASK) << shift).sum())


_SECOND_SEED = (_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _MASK


def _finalise(x: torch.Tensor) -> torch.Tensor:
    """Compute MurmurHash3's last step on 32-bit words."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return x ^ x >> 31
