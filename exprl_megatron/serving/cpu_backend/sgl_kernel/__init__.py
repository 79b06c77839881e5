"""Stand-in for SGLang's kernels: placeholders, the hash behind seeded sampling, and gated delta nets.

Submodules but `mamba` are absent on purpose: where SGLang fails to import one, it takes its own fallback.
"""

import torch
from exprl_cpu_delta_net import OPERATIONS
from exprl_placeholder import placeholders

__version__ = "0.0.0"
__getattr__ = placeholders("sgl_kernel")

_MASK = 0xFFFFFFFF


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _scrambled(word: torch.Tensor) -> torch.Tensor:
    word = _rotate((word * 0xCC9E2D51) & _MASK, 15)
    return (word * 0x1B873593) & _MASK


def _absorb(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    return (_rotate(state ^ _scrambled(word), 13) * 5 + 0xE6546B64) & _MASK


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """Compute MurmurHash3_x86_32, hash seed 0, of the 16 bytes (seed low, seed high, position, column).

    `seed` [n] uint64 or int64, `positions` [n], `col_indices` [m]; the result is [n, m] uint32. What is of rows or
    columns alone is computed on 32-bit words held in int64; a product that overflows keeps its low 32 bits right.
    """
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    state = _absorb(torch.zeros_like(seed), seed & _MASK)
    state = _absorb(state, (seed >> 32) & _MASK)
    state = _absorb(state, positions.to(torch.int64) & _MASK)
    # There is a column for each token of a vocabulary, so int32 and two buffers are used: half the bytes.
    state = state.to(torch.int32)[:, None] ^ _scrambled(col_indices.to(torch.int64) & _MASK).to(torch.int32)
    other = _shifted(state, 19, torch.empty_like(state))
    state.bitwise_left_shift_(13).bitwise_or_(other).mul_(5).add_(_signed(0xE6546B64)).bitwise_xor_(16)
    for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state.bitwise_xor_(_shifted(state, bits, other)).mul_(_signed(factor))
    return state.bitwise_xor_(_shifted(state, 16, other)).view(torch.uint32)


def _signed(word: int) -> int:
    """Return the int32 of the same bits."""
    return word - (word >> 31 << 32)


def _shifted(words: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Shift int32 `words` to the right, with zeros from the left."""
    return torch.bitwise_right_shift(words, bits, out=out).bitwise_and_(_MASK >> bits)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
# A process that imports this again has the operator already.
if not hasattr(torch.ops.sgl_kernel, "murmur_hash32_cpu"):
    _hash = "murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor"
    for schema, function in (OPERATIONS | {_hash: murmur_hash32}).items():
        _library.define(schema)
        _library.impl(schema.partition("(")[0], function, "CPU")
