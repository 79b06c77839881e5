"""Who gets which sequence; between processes it is the matter of layouts_worker.py."""

import pickle

import pytest
from helpers.witness import loss_function, sequences, tokens
from megatron.core.parallel_state import RankGenerator

from exprl_megatron.algorithms.batch import TrainSample, dummy_sample
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.scatter import SampleScatter, _of, dp_rank_of


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(dp=8), Layout(tp=2, dp=3, pp=2), Layout(tp=2, cp=2, dp=2, pp=2), Layout(cp=2, dp=4, ep=4)],
)
def test_ranks_are_laid_out_as_megatron_lays_them_out(layout):
    order = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order="tp-cp-ep-dp-pp")
    for ranks in order.get_ranks("dp"):
        assert [dp_rank_of(layout, rank) for rank in ranks] == list(range(layout.dp))


def test_a_rank_gets_its_own_sequences_and_outlines_of_the_rest_once():
    batch = [TrainSample((1, 2), (3,) * n, advantages=(0.5,) * n) for n in (4, 1, 3)]
    first, second = _of(1, [batch, batch], [[0, 1, 1], [0, 1, 1]])
    assert [isinstance(sequence, TrainSample) for sequence in first] == [False, True, True]
    assert list(map(len, first)) == list(map(len, batch)) and first[0].token_fields == {"advantages"}
    assert dummy_sample(first) == dummy_sample(batch)
    first, second = pickle.loads(pickle.dumps((first, second)))
    assert first[1] == batch[1] and first[1] is second[1]
    with pytest.raises(ValueError, match="read-only"):
        first[1].response_ids[0] = 7


def test_values_are_added_to_sequences_and_noted_in_outlines():
    sequence = TrainSample((1, 2), (3, 4))
    assert sequence.with_values("old_log_probs", [-1.0, -2.0]).old_log_probs.tolist() == [-1.0, -2.0]
    assert sequence.outline.with_values("old_log_probs", [-1.0, -2.0]).token_fields == {"old_log_probs"}
    with pytest.raises(ValueError, match="old_log_probs has 1 values for a response of 2 tokens"):
        sequence.with_values("old_log_probs", [-1.0])


def test_one_process_learns_the_same_from_what_is_scattered(tiny_model, world):
    config = PolicyConfig(model=str(tiny_model("qwen2")), max_tokens=40, micro_batch_tokens=64)
    policy = Policy(config, seed=0)
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=1)
    batch = sequences(128)
    (found,) = SampleScatter(policy).scatter([batch])
    assert found == batch and policy.owners(batch) == [0] * len(batch)
    assert policy.accumulate(found, loss_function, 1.0, tokens(found))["loss"] != 0
