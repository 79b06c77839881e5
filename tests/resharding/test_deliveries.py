"""Direct deliveries: carried out by hand on shards as loading cuts them, they bring every server rank what it holds."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.architecture import read_architecture
from exprl_megatron.resharding.deliveries import plan_deliveries, shares
from exprl_megatron.resharding.messages import copies, holders
from exprl_megatron.resharding.names import hf_shapes, parameters
from exprl_megatron.resharding.sources import Random, read_part
from exprl_megatron.serving.loader_orders import Need
from exprl_megatron.serving.sharding import server_needs

BUDGET = 20_000
EXPERTS = Layout(tp=2, pp=2, dp=2, ep=2, etp=2, sequence_parallel=True)
CASES = [
    ("qwen3", Layout(), 1),
    ("qwen3", Layout(tp=2), 1),
    ("qwen2", Layout(tp=2, pp=2), 2),
    ("llama", Layout(pp=2, vpp=2, dp=2), 4),
    ("qwen3-moe", EXPERTS, 2),
    ("mixtral", Layout(dp=4, ep=2, pp=2), 1),
]


def architecture_of(tiny_model, family):
    """Four layers and a vocabulary that padding must fill."""
    return replace(read_architecture(tiny_model(family, vocab_size=127)), layers=4)


def shards(architecture, layout, source):
    """Each rank's parameters, as loading a model directory makes them."""
    shapes = hf_shapes(architecture)
    held = defaultdict(dict)
    for parameter in parameters(architecture, layout):
        ranks = holders(parameter, layout)
        for index, first in enumerate(ranks):
            parts = [
                read_part(source, name, shapes[name], parameter.rule.split_dim, index, len(ranks))
                for name in parameter.hf_names
            ]
            for rank in copies(parameter, first, layout):
                held[rank][parameter] = parameter.rule.merge(parts)
    return held


def rectangle(tensor, row, rows, column, columns):
    return tensor.view(len(tensor), -1)[row : row + rows, column : column + columns]


@pytest.mark.parametrize(("family", "layout", "tp"), CASES)
def test_every_server_rank_gets_every_number_that_it_holds_once(tiny_model, family, layout, tp):
    architecture = architecture_of(tiny_model, family)
    source, shapes = Random(architecture, 3), hf_shapes(architecture)
    held = shards(architecture, layout, source)
    needs = [server_needs(shapes, tp, architecture.kv_groups)] * 2
    got = [[torch.full((need.rows, need.columns), torch.nan) for need in rank] for server in needs for rank in server]
    for one in plan_deliveries(needs, shares(architecture, layout), layout, "float32", BUDGET):
        target = got[one.delivery.target - layout.world_size]
        for part, (parameter, row, column) in zip(one.delivery.parts, one.sources, strict=True):
            own = held[one.delivery.source][parameter]
            into = rectangle(target[part.need], *part[1:])
            assert into.isnan().all()
            into.copy_(rectangle(own, row, part.rows, column, part.columns))
    for rank_needs, tensors in zip((rank for server in needs for rank in server), got, strict=True):
        for need, tensor in zip(rank_needs, tensors, strict=True):
            assert torch.equal(tensor, rectangle(source.read(need.name), *need[1:])), need


@pytest.mark.parametrize(("family", "layout", "tp"), CASES)
def test_no_rank_has_more_than_a_bucket_on_its_way_in_a_round(tiny_model, family, layout, tp):
    architecture = architecture_of(tiny_model, family)
    needs = [server_needs(hf_shapes(architecture), tp, architecture.kv_groups)]
    bucket = 300_000
    deliveries = [
        one.delivery for one in plan_deliveries(needs, shares(architecture, layout), layout, "float32", bucket)
    ]
    assert [d.round for d in deliveries] == sorted(d.round for d in deliveries) and deliveries[-1].round > 0
    on_the_way = Counter()
    for delivery in deliveries:
        for rank in (delivery.source, delivery.target):
            on_the_way[rank, delivery.round] += 4 * delivery.count
    assert max(on_the_way.values()) <= bucket


def test_small_parts_share_a_message_and_large_ones_have_their_own(tiny_model):
    architecture = architecture_of(tiny_model, "qwen3")
    needs = [server_needs(hf_shapes(architecture), 1, architecture.kv_groups)]
    deliveries = [
        one.delivery for one in plan_deliveries(needs, shares(architecture, Layout()), Layout(), "bfloat16", 2**30)
    ]
    (small,) = (delivery for delivery in deliveries if len(delivery.parts) > 1)
    assert all(2 * part.count < 2**16 for part in small.parts)
    assert all(2 * delivery.count >= 2**16 for delivery in deliveries if delivery is not small)


def test_servers_are_sent_to_by_different_copies(tiny_model):
    architecture, layout = architecture_of(tiny_model, "qwen3"), Layout(tp=2, dp=2)
    needs = [server_needs(hf_shapes(architecture), 2, architecture.kv_groups)] * 3
    senders = defaultdict(set)
    for one in plan_deliveries(needs, shares(architecture, layout), layout, "float32", BUDGET):
        senders[(one.delivery.target - layout.world_size) // 2].add(one.delivery.source)
    assert senders == {0: {0, 1}, 1: {2, 3}, 2: {0, 1}}


@pytest.mark.parametrize("need", [Need("model.norm.weight", 0, 65, 0, 1), Need("model.other.weight", 0, 1, 0, 1)])
def test_what_nobody_holds_is_refused(tiny_model, need):
    architecture, layout = architecture_of(tiny_model, "qwen3"), Layout()
    with pytest.raises(ValueError, match=need.name):
        plan_deliveries([[[need]]], shares(architecture, layout), layout, "float32", BUDGET)
