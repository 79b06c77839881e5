"""Which experts each rank's routers take, where a micro-batch is packed, padded and cut over ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from exprl_megatron.algorithms.batch import TrainSample, replays_routing
from exprl_megatron.config.policy import Layout
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy.model_input import model_input
from exprl_megatron.policy.packing import PackingShape
from exprl_megatron.policy.routed_rows import routed_rows
from exprl_megatron.policy.world import World

ROUTING = Routing(layers=3, top_k=2, experts=200)
BATCH = [
    TrainSample((5, 6), (7, 8, 9)),
    TrainSample((4,), (3,)),
    TrainSample(tuple(range(20, 31)), tuple(range(40, 46))),
]


def experts_of(token_id: int, layer: int) -> list[int]:
    """What nothing but the token itself and the layer decides, so that a row says whose it is."""
    return [token_id, 100 + 10 * layer]


def routed(sample: TrainSample) -> TrainSample:
    rows = [[experts_of(token, layer) for layer in range(ROUTING.layers)] for token in sample.token_ids[:-1].tolist()]
    return replace(sample, routed_experts=np.array(rows, np.uint8))


def rows_and_inputs(batch: list[TrainSample], packed: bool, layout: Layout, cp_rank: int, tp_rank: int):
    """(rows, token ids of these rows), the latter from the tested model input, in the order of its hidden states."""
    tp = layout.tp if layout.sequence_parallel else 1
    sequence = 2 * layout.cp if layout.cp > 1 else 1
    shape = PackingShape(packed, sequence, row=sequence * layout.cp * tp, cp=layout.cp)
    world = World(layout, torch.device("cpu"), 0, tp_rank, 0, 0, cp_rank)
    tokens = model_input(batch, max(map(len, batch)), shape, cp_rank)
    part = tokens.input_ids.T.chunk(tp)[tp_rank if tp > 1 else 0]
    return routed_rows(batch, shape, ROUTING, range(ROUTING.layers), world), part.flatten().tolist()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(cp=2), Layout(tp=2, sequence_parallel=True), Layout(tp=2, cp=2, sequence_parallel=True)],
    ids=["alone", "cp2", "tp2+sp", "tp2xcp2+sp"],
)
def test_each_rank_s_routers_take_the_experts_of_the_tokens_that_they_see(packed, layout):
    batch = [routed(sample) for sample in BATCH]
    seen = []
    for cp_rank in range(layout.cp):
        for tp_rank in range(layout.tp):
            rows, ids = rows_and_inputs(batch, packed, layout, cp_rank, tp_rank)
            assert rows.shape == (len(ids), 3, 2) and rows.dtype == torch.uint8
            for row, token in zip(rows.tolist(), ids, strict=True):
                assert all(len(set(chosen)) == 2 for chosen in row)
                # The last token of a sequence, and padding, have experts that say nothing.
                if row == [experts_of(token, layer) for layer in range(3)]:
                    seen.append(token)
    assert sorted(seen) == sorted(token for sample in batch for token in sample.token_ids[:-1].tolist())


def test_padding_and_last_tokens_go_to_all_experts_equally_often():
    shape, world = PackingShape(packed=True, row=100), World(Layout(), torch.device("cpu"), 0, 0, 0, 0)
    routing = Routing(layers=2, top_k=3, experts=5)
    rows = routed_rows([TrainSample((1,), ())], shape, routing, range(2), world)
    assert all(len(set(chosen)) == 3 for token in rows.tolist() for chosen in token)
    assert np.bincount(rows[:, 1].flatten()).tolist() == [60] * 5


def test_many_experts_have_ids_of_two_bytes():
    assert (Routing(4, 2, 256).dtype, Routing(4, 2, 256).token_bytes) == (np.uint8, 8)
    assert (Routing(4, 2, 257).dtype, Routing(4, 2, 257).token_bytes) == (np.int16, 16)
    shape, world = PackingShape(packed=True), World(Layout(), torch.device("cpu"), 0, 0, 0, 0)
    sample = TrainSample((1,), (2,), routed_experts=np.array([[[511, 300]]], np.int16))
    assert routed_rows([sample], shape, Routing(1, 2, 512), [0], world)[0].long().tolist() == [[511, 300]]


def test_ranks_that_do_not_learn_from_a_sample_know_that_it_has_its_experts():
    with_rows, without = routed(BATCH[0]), BATCH[1]
    assert replays_routing([with_rows, routed(BATCH[1]).outline]) and not replays_routing([without, without.outline])
    assert replays_routing([with_rows.outline.with_values("old_log_probs", np.zeros(3))])
    for mixed in ([with_rows, without.outline], [without, with_rows.outline]):
        with pytest.raises(ValueError, match="routed_experts is given for some samples of a batch and missing for"):
            replays_routing(mixed)


@pytest.mark.parametrize("shape", [(3, 3, 2), (5, 3, 2), (4, 3)])
def test_experts_of_another_number_of_tokens_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"routed_experts is of shape .* not \[4, layers, top_k\] of integers for 5 tok"
    ):
        TrainSample((5, 6), (7, 8, 9), routed_experts=np.zeros(shape, np.uint8))
