"""Hashes of parts of weights: by definition, whatever the strides; and changes that a weaker sum would not see."""

import numpy as np
import pytest
import torch
import xxhash

import exprl_megatron.serving.part_hash as part_hash
from exprl_megatron.serving.part_hash import hash_parts, word_hash
from exprl_megatron.serving.transfer_tables import Slice

MASK = 2**64 - 1


def mixed(x):
    """SplitMix64 (Steele, Lea and Flood 2014), on Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def by_definition(data: bytes) -> int:
    total = 0
    words = np.frombuffer(data + bytes(-len(data) % 16384), "<i4").reshape(-1, 4096).tolist()
    keys = [xxhash.xxh3_64_intdigest(index.to_bytes(4, "little")) for index in range(4096)]
    for tile, row in enumerate(words, start=1):
        total += mixed((sum(k * w for k, w in zip(keys, row, strict=True)) + tile * 0x9E3779B97F4A7C15) & MASK)
    return total & MASK


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (3, 5), (130, 127), (2, 9000)])
def test_the_hash_on_cuda_is_its_definition_whatever_the_strides(shape, monkeypatch):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = by_definition(numbers.view(torch.uint8).numpy().tobytes())
    assert word_hash(numbers) & MASK == expected
    wider = torch.cat([torch.ones(shape[0], 3), numbers, torch.ones(shape[0], 2)], dim=1).bfloat16()
    assert word_hash(wider[:, 3:-2]) & MASK == expected
    # At an address that is no word's.
    odd = torch.cat([torch.ones(1).bfloat16(), numbers.view(-1)])[1:].view(shape)
    assert word_hash(odd) & MASK == expected


@pytest.mark.parametrize("hashed", ["bytes", "words"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changes_that_keep_sums_are_found(hashed, dtype, monkeypatch):
    if hashed == "words":
        monkeypatch.setattr(part_hash, "_byte_hash", lambda numbers: int(word_hash(numbers)))
    numbers = torch.randn(96, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    place = Slice(0, 0, 96, 0, 512)

    def changed(change):
        other = numbers.clone()
        change(other)
        return hash_parts([(place, other)])[0]

    def negate_two(x):
        x[0, 1] *= -1
        x[0, 3] *= -1

    def swap(x):
        x[[0, 50]] = x[[50, 0]]

    def negate_all(x):
        x.neg_()

    def swap_tiles(x):
        # Of 4096 words each.
        flat = x.view(-1)
        count = 16384 // x.element_size()
        first, second = flat[:count].clone(), flat[count : 2 * count].clone()
        flat[:count], flat[count : 2 * count] = second, first

    hashes = [changed(change) for change in (lambda x: None, negate_two, swap, negate_all, swap_tiles)]
    assert len(set(hashes)) == len(hashes)


def test_a_part_s_place_is_in_its_hash_and_strides_are_not():
    numbers = torch.randn(40, 30)
    places = [Slice(0, 0, 40, 0, 30), Slice(0, 0, 30, 0, 40), Slice(0, 1, 40, 0, 30), Slice(0, 0, 40, 1, 30)]
    hashes = hash_parts([(place, numbers) for place in places])
    assert len(set(hashes.tolist())) == len(places)
    wider = torch.cat([numbers, torch.zeros(40, 2)], dim=1)
    assert hash_parts([(places[0], wider[:, :30])])[0] == hashes[0]


def test_a_large_part_with_gaps_is_hashed_piece_by_piece(monkeypatch):
    numbers = torch.randn(50, 33)
    whole = hash_parts([(Slice(0, 0, 50, 0, 33), numbers)])
    monkeypatch.setattr(part_hash, "_COPIED_BYTES", 300)
    gaps = torch.zeros(50, 40)
    gaps[:, :33] = numbers
    assert hash_parts([(Slice(0, 0, 50, 0, 33), gaps[:, :33])]) == whole
