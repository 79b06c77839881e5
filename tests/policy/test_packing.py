import random

import pytest

from exprl_megatron.policy.packing import pack, padded


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_every_sequence_is_in_one_place_and_no_micro_batch_is_over_budget(ranks, group):
    lengths = [random.Random(number).randint(1, 60) for number in range(50)]
    packed = pack(lengths, ranks, budget=100, multiple=8, group=group)
    assert sorted(i for micros in packed for rows in micros for i in rows) == list(range(50))
    assert len({len(micros) for micros in packed}) == 1
    assert len(packed[0]) % group == 0
    for rows in (rows for micros in packed for rows in micros if rows):
        assert len(rows) * padded(max(lengths[i] for i in rows), 8) <= 100


def test_ranks_get_like_work():
    packed = pack([40, 30, 20, 10], ranks=2, budget=1)
    assert [sorted(i for rows in micros for i in rows) for micros in packed] == [[0, 3], [1, 2]]


def test_a_sequence_over_budget_stands_alone():
    assert pack([5, 200, 4], ranks=1, budget=10) == [[[1], [0, 2]]]


def test_ranks_without_work_get_filler():
    assert pack([7], ranks=3, budget=10, group=2) == [[[0], []], [[], []], [[], []]]


def test_padding_rounds_up():
    assert [padded(n, 4) for n in (1, 4, 5)] == [4, 4, 8]
