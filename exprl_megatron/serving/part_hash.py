"""64-bit hashes of parts of weights, the same wherever the part is held: by a trainer's rank or by a server's.

On a CPU it is XXH3 of the bytes. On CUDA, which XXH3 does not suit, 32-bit words are multiplied by fixed random 64-bit
numbers and summed over tiles (multilinear hashing: Carter and Wegman 1979, doi:10.1016/0022-0000(79)90044-8), and the
tiles' sums are mixed with their index and summed. Both find accidental errors; neither is a signature.
"""

import struct
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import torch
import xxhash

from exprl_megatron.serving.tensor_bytes import tensor_bytes
from exprl_megatron.serving.transfer_tables import Slice

_TILE = 4096
"""Words."""
_COPIED_BYTES = 2**20
"""Bytes of a part with strides that are copied together on a CPU."""
_WORDS_BYTES = 2**25
"""Bytes that are hashed together on CUDA, which needs up to seven times as much scratch memory."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_PLACED = struct.Struct("<5iQ")


def hash_parts(parts: Iterable[tuple[Slice, torch.Tensor]]) -> np.ndarray:
    """Return uint64 [parts]: of each part's place in a server's parameter and of its bytes.

    A part is [rows, columns], of any strides, all on one device; each is read once, in order.
    """
    places: list[Slice] = []
    on_host: list[int] = []
    on_device: list[torch.Tensor] = []
    for place, numbers in parts:
        places.append(place)
        if numbers.device.type == "cpu":
            on_host.append(_byte_hash(numbers))
        else:
            on_device.append(word_hash(numbers))
    # In one transfer: each transfer would wait for the device.
    found = torch.stack(on_device).tolist() if on_device else on_host
    packed = (_PLACED.pack(*place, value & _MASK) for place, value in zip(places, found, strict=True))
    return np.array([xxhash.xxh3_64_intdigest(each) for each in packed], dtype=np.uint64)


def accumulate_hashes(numbers: np.ndarray, hashes: np.ndarray, count: int) -> np.ndarray:
    """Return uint64 [count]: the sums, modulo 2**64, of the hashes that have the same of `count` numbers (both
    [parts]).
    """
    sums = np.zeros(count, dtype=np.uint64)
    np.add.at(sums, numbers, hashes)
    return sums


def word_hash(numbers: torch.Tensor) -> torch.Tensor:
    """Return the hash of a part on CUDA: int64 [], on its device."""
    keys, total, tile = _keys(numbers.device), torch.zeros((), dtype=torch.int64, device=numbers.device), 0
    for piece in _pieces(numbers, _WORDS_BYTES):
        missing = -len(piece) % (4 * _TILE)
        if missing:
            piece = torch.nn.functional.pad(piece, (0, missing))
        elif piece.storage_offset() % 4:
            piece = piece.clone()  # a view of words must begin at one
        words = piece.view(torch.int32).view(-1, _TILE)  # [tiles, words]
        sums = (words.to(torch.int64) * keys).sum(dim=1)
        indices = torch.arange(tile + 1, tile + 1 + len(words), device=numbers.device)
        total += _mixed(sums + indices * _signed(_GOLDEN)).sum()
        tile += len(words)
    return total


def _byte_hash(numbers: torch.Tensor) -> int:
    if numbers.is_contiguous():
        return xxhash.xxh3_64_intdigest(tensor_bytes(numbers))
    digest = xxhash.xxh3_64()
    for piece in _pieces(numbers, _COPIED_BYTES):
        digest.update(tensor_bytes(piece))
    return digest.intdigest()


def _pieces(numbers: torch.Tensor, nbytes: int) -> Iterator[torch.Tensor]:
    """Yield the bytes of `numbers`, row by row, about `nbytes` at a time: the same pieces whatever the strides."""
    rows = max(1, nbytes // (numbers.shape[1] * numbers.element_size()))
    for some in numbers.split(rows):
        yield _bytes(some.contiguous())


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.reshape(-1).view(torch.uint8)


@cache
def _keys(device: torch.device) -> torch.Tensor:
    """Return int64 [words of a tile]: the factor of each word of a tile."""
    keys = [_signed(xxhash.xxh3_64_intdigest(index.to_bytes(4, "little"))) for index in range(_TILE)]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Compute SplitMix64's output function on int64, whose products keep their low 64 bits."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right as an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
