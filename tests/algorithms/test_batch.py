import pytest
import torch

from exprl_megatron.algorithms.batch import TrainSample, dummy_sample, pad

ONE = TrainSample((5, 6), (7, 8, 9), advantages=(0.1, 0.2, 0.3))
TWO = TrainSample((4,), (3,), advantages=(0.4,))


def test_targets_mask_and_numbers_are_where_the_response_is_predicted():
    micro = pad([ONE, TWO], length=6)
    assert micro.targets.tolist() == [[6, 7, 8, 9, 0, 0], [3, 0, 0, 0, 0, 0]]
    assert micro.mask.tolist() == [[0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert torch.equal(micro.advantages, torch.tensor([[0, 0.1, 0.2, 0.3, 0, 0], [0.4, 0, 0, 0, 0, 0]]))
    assert micro.old_log_probs is None


def test_numbers_given_for_some_sequences_only_are_an_error():
    with pytest.raises(ValueError, match="advantages is given for some"):
        pad([ONE, TrainSample((1,), (2,))], length=5)


def test_a_filler_has_the_same_numbers_and_no_weight():
    micro = pad([dummy_sample([ONE, TWO])], length=2)
    assert micro.mask.sum() == 0
    assert micro.advantages.sum() == 0
    assert micro.ref_log_probs is None


def test_a_micro_batch_moves_whole():
    moved = pad([ONE], length=5).to(torch.device("meta"))
    assert moved.advantages.device.type == moved.targets.device.type == "meta"
    assert moved.old_log_probs is None
