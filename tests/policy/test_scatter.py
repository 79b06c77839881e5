"""Who gets which sequence; between processes it is the matter of layouts_worker.py."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.witness import loss_function, sequences, tokens
from megatron.core.parallel_state import RankGenerator

from exprl_megatron.algorithms.batch import TrainSample, dummy_sample
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy import scatter as module
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.routed_rows import stage_experts
from exprl_megatron.policy.scatter import (
    SampleScatter,
    _of,
    _with_experts,
    _without_experts,
    dp_rank_of,
    experts_of,
    stage_of,
)


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


@pytest.mark.parametrize(("family", "dense"), [("qwen3-moe", 0), ("glm4-moe", 1)])
@pytest.mark.parametrize("layout", [Layout(dp=2, pp=2), Layout(tp=2, dp=2, pp=2, vpp=2, sequence_parallel=True)])
def test_each_byte_of_the_experts_goes_to_one_stage_of_one_data_parallel_rank(tiny_model, family, dense, layout):
    """Megatron's own order says which ranks receive a message together: those that differ in tp and cp alone."""
    order = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order="tp-cp-ep-dp-pp")
    together = [[rank for rank in range(layout.world_size) if stage_of(layout, rank) == n] for n in range(4)]
    assert together == order.get_ranks("tp-cp")
    architecture = read_architecture(tiny_model(family, layers=4))
    routing = Routing.of(architecture)
    stages = routing.layers_of_stages(architecture, layout)
    assert stages == _stages(dense, layout)
    ids = np.arange(7 * 4 * 2, dtype=np.uint8).reshape(7, 4, 2)
    batch = [TrainSample((1, 2), (3,) * n, routed_experts=ids[: n + 1]) for n in (6, 1, 3)]
    owners, sent = [[0, 1, 0]] * 2, 0
    for dp_rank in range(layout.dp):
        share = _of(dp_rank, [batch, batch], owners)
        bare = pickle.loads(pickle.dumps(_without_experts(share)))
        assert not any(sample.routed_experts is not None for sample in bare[0] if isinstance(sample, TrainSample))
        for layers in stages:
            message = experts_of(share, layers)
            sent += sum(experts.nbytes for experts in message)
            received, again = _with_experts(bare, pickle.loads(pickle.dumps(message)), layers)
            for index, sample in enumerate(received):
                if owners[0][index] == dp_rank:
                    assert sample is again[index] and sample.routed_layers == layers
                    whole = replace(sample, routed_experts=None, routed_layers=None)
                    assert whole == replace(batch[index], routed_experts=None)
                    assert np.array_equal(sample.routed_experts, batch[index].routed_experts[:, layers])
                    assert np.array_equal(stage_experts(sample, layers[-1:]), sample.routed_experts[:, -1:])
                else:
                    assert sample.has_routed_experts and not isinstance(sample, TrainSample)
    assert sent == sum(len(sample) - 1 for sample in batch) * (4 - dense) * 2


def test_a_rank_of_a_later_stage_is_given_its_own_layers_experts_and_rank_0_keeps_all(tiny_model, monkeypatch):
    architecture, layout = read_architecture(tiny_model("qwen3-moe", layers=4)), Layout(pp=2)
    batch = [TrainSample((1, 2), (3,) * n, routed_experts=np.full((n + 1, 4, 2), n, np.uint8)) for n in (6, 1)]
    shared, sent = [], []
    monkeypatch.setattr(module, "gloo_group", lambda: None)
    monkeypatch.setattr(module, "send_object", lambda found, to, group: sent.append((to, pickle.dumps(found))))
    monkeypatch.setattr(module, "receive_object", lambda source, group: pickle.loads(sent.pop(0)[1]))

    def broadcast(found, source, group):
        if source == ranks[-1]:
            shared.append(pickle.dumps(found))
            return found
        return pickle.loads(shared.pop(0))

    monkeypatch.setattr(module, "broadcast_object", broadcast)
    found, ranks = [], []
    for rank in (0, 1):
        ranks.append(rank)
        processes = {"get_rank": lambda: ranks[-1], "new_group": lambda ranks, backend: ranks, "get_world_size": len}
        monkeypatch.setattr(module, "dist", SimpleNamespace(**processes))
        world = SimpleNamespace(layout=layout, pp_rank=rank)
        policy = SimpleNamespace(architecture=architecture, world=world, owners=lambda batch: [0] * len(batch))
        found.append(SampleScatter(policy).scatter([batch] if rank == 0 else None)[0])
    assert found[0] == batch and not sent
    assert [sample.routed_layers for sample in found[1]] == [(2, 3)] * 2
    for sample, whole in zip(found[1], batch, strict=True):
        assert np.array_equal(sample.routed_experts, whole.routed_experts[:, 2:])


def _stages(dense: int, layout: Layout) -> list[tuple[int, ...]]:
    whole = [(0, 2), (1, 3)] if layout.vpp > 1 else [(0, 1), (2, 3)]
    return [tuple(layer for layer in layers if layer >= dense) for layers in whole]


def test_samples_without_experts_of_a_mixture_stay_without():
    share = [[TrainSample((1,), (2, 3)), TrainSample((1,), (2, 3), routed_experts=np.zeros((2, 2, 1), np.uint8))]]
    experts = experts_of(share, (1,))
    assert experts[0] is None and experts[1].shape == (2, 1, 1)
    (found,) = _with_experts(_without_experts(share), experts, (1,))
    assert found[0] == share[0][0] and found[1].routed_layers == (1,)


def test_experts_of_other_layers_than_a_sample_names_are_refused():
    for given in (None, np.zeros((2, 2, 1), np.uint8)):
        with pytest.raises(ValueError, match="routed_experts does not have the 3 layers of routed_layers"):
            TrainSample((1,), (2, 3), routed_experts=given, routed_layers=(0, 1, 2))
