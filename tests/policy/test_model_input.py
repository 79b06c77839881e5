import pytest
import torch

from exprl_megatron.algorithms.batch import TrainSample, pad
from exprl_megatron.policy.context_parallel import natural_order, own_columns
from exprl_megatron.policy.model_input import model_input
from exprl_megatron.policy.packing import PackingShape

ONE, TWO = TrainSample((5, 6), (7, 8, 9)), TrainSample((4,), (3,))


def test_padded_rows():
    tokens = model_input([ONE, TWO], 5, PackingShape(packed=False, row=3))
    assert tokens.input_ids.tolist() == [[5, 6, 7, 8, 9, 0], [4, 3, 0, 0, 0, 0]]
    assert tokens.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert tokens.cu_seqlens is None


def test_packed_sequences_are_contiguous_and_each_begins_at_position_0():
    tokens = model_input([ONE, TWO], 5, PackingShape(packed=True, sequence=2, row=10))
    assert tokens.input_ids.tolist() == [[5, 6, 7, 8, 9, 0, 4, 3, 0, 0]]
    assert tokens.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]
    assert tokens.cu_seqlens.tolist() == [0, 6, 10]
    assert (tokens.longest, tokens.cu_seqlens.dtype) == (6, torch.int32)


def test_ranks_share_a_sequence_as_transformer_engine_expects():
    """Of 2 x cp chunks the rank holds the r-th and the r-th last (TE's documentation of its load-balanced split)."""
    assert own_columns([8, 4], cp=2, rank=0).tolist() == [0, 1, 6, 7, 8, 11]
    assert own_columns([8, 4], cp=2, rank=1).tolist() == [2, 3, 4, 5, 9, 10]
    parts = torch.cat([own_columns([8, 16], cp=4, rank=rank) for rank in range(4)])
    assert parts[natural_order([8, 16], cp=4)].tolist() == list(range(24))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_every_response_token_has_one_place_and_one_slot_on_one_rank(packed, cp):
    """A model that outputs its own input shows which token's output lands where."""
    batch = [ONE, TWO, TrainSample(tuple(range(20, 31)), tuple(range(40, 46)))]
    micro = pad(batch, 17)
    table = torch.zeros(micro.targets.numel(), dtype=torch.long)
    for rank in range(cp):
        tokens = model_input(batch, 17, PackingShape(packed, sequence=2 * cp, row=4 * cp, cp=cp), rank)
        assert tokens.input_ids.shape == tokens.position_ids.shape
        outputs = tokens.input_ids.T.flatten()
        assert (table[tokens.slots] == 0).all()
        table[tokens.slots] = outputs[tokens.places]
    table = table.view_as(micro.targets)
    assert torch.equal(table > 0, micro.mask > 0)
    for row, sequence in enumerate(batch):
        before = sequence.token_ids[sequence.prompt_tokens - 1 : -1].tolist()
        assert table[row][micro.mask[row] > 0].tolist() == list(before)


def test_an_input_moves_whole():
    moved = model_input([ONE], 5, PackingShape(packed=True)).to(torch.device("meta"))
    assert {t.device.type for t in (moved.input_ids, moved.places, moved.cu_seqlens)} == {"meta"}
