"""Tables of a direct sync: they are read as they were packed, small where they repeat, refused where they are wrong."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprl_megatron.serving.transfer_tables import (
    MESSAGE,
    RECTANGLE,
    RankTransfers,
    Transfer,
    pack_needs,
    pack_transfers,
    unpack_needs,
    unpack_transfers,
)

SHAPES = {"words": (100, 2, 4), "norm": (8,)}
NEEDS = np.array([(0, 50, 50, 0, 8), (1, 0, 8, 0, 1)], dtype=RECTANGLE)
TWO_ROUNDS = RankTransfers(
    np.array([(0, 3, 1), (0, 1, 2), (4, 3, 1)], dtype=MESSAGE),
    np.array([(0, 0, 20, 0, 8), (0, 20, 5, 0, 8), (1, 0, 8, 0, 1), (0, 25, 25, 0, 8)], dtype=RECTANGLE),
)


def test_needs_are_read_as_they_were_packed():
    assert unpack_needs(pack_needs(NEEDS), SHAPES).tolist() == NEEDS.tolist()


def test_deliveries_are_read_as_they_were_packed():
    read = unpack_transfers(pack_transfers(TWO_ROUNDS), NEEDS)
    assert read.messages.tolist() == TWO_ROUNDS.messages.tolist()
    assert read.parts.tolist() == TWO_ROUNDS.parts.tolist()


def test_rounds_have_their_messages_and_messages_their_parts():
    assert list(TWO_ROUNDS.rounds()) == [
        [Transfer(3, ((0, 0, 20, 0, 8),)), Transfer(1, ((0, 20, 5, 0, 8), (1, 0, 8, 0, 1)))],
        [Transfer(3, ((0, 25, 25, 0, 8),))],
    ]
    assert TWO_ROUNDS.counts().tolist() == [160, 48, 200]


def test_a_rank_that_sends_nothing_has_no_rounds():
    assert list(RankTransfers(np.empty(0, MESSAGE), np.empty(0, RECTANGLE)).rounds()) == []


@given(st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 5)))
def test_any_numbers_of_32_bits_are_packed_and_those_outside_the_tensors_are_refused(rows):
    table = np.array(rows, dtype=RECTANGLE)
    within = all(
        of in (0, 1)
        and min(row, column) >= 0 < min(height, width)
        and row + height <= [100, 8][of]
        and column + width <= [8, 1][of]
        for of, row, height, column, width in rows
    )
    if within:
        assert unpack_needs(pack_needs(table), SHAPES).tolist() == table.tolist()
    else:
        with pytest.raises(ValueError, match="outside what it is a part of; run trainer and servers with the same"):
            unpack_needs(pack_needs(table), SHAPES)


def test_the_experts_of_a_large_model_take_less_than_a_byte_each():
    count = 94 * 128 * 3
    table = np.zeros(count, dtype=RECTANGLE)
    table["of"], table["rows"], table["columns"] = np.arange(count), 192, 4096
    assert len(pack_needs(table)) < count / 4


def wrong(field, value):
    made = msgspec.msgpack.decode(pack_transfers(TWO_ROUNDS))
    table, column = field
    made[table]["columns"][column] = value
    return msgspec.msgpack.encode(made)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"[[0, 1, 2, []]]", "cannot be read"),
        (pack_needs(NEEDS), "cannot be read"),
        (wrong(("parts", "row"), b"not compressed"), "column row .* is damaged"),
        (wrong(("parts", "other"), b""), "expected columns of, row, rows, column, columns"),
        (pack_transfers(RankTransfers(TWO_ROUNDS.messages[:2], TWO_ROUNDS.parts)), "do not fit their parts"),
        (pack_transfers(RankTransfers(TWO_ROUNDS.messages[::-1], TWO_ROUNDS.parts)), "do not fit their parts"),
        (pack_transfers(RankTransfers(TWO_ROUNDS.messages[:1], NEEDS[:1])), r"Slice\(of=0, row=50.* is outside"),
    ],
)
def test_deliveries_that_a_rank_cannot_receive_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack_transfers(packed, NEEDS)
