"""Direct transfers: carried out by hand on shards as loading cuts them, they bring every server rank what it holds."""

from collections import defaultdict, deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.loaded_shards import CASES, architecture_of, shards
from helpers.operations import python_calls

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.weight_readers import RandomWeights
from exprl_megatron.serving.loader_commands import RequiredSlice
from exprl_megatron.serving.sharding import server_needs
from exprl_megatron.serving.transfer_tables import Slice, Transfer, needs_table
from exprl_megatron.weight_sync.p2p_schedule import TransferPlan
from exprl_megatron.weight_sync.p2p_sender import P2PSender
from exprl_megatron.weight_sync.shard_table import shard_table

BUDGET = 20_000


def rectangle(tensor, row, rows, column, columns):
    return tensor.view(len(tensor), -1)[row : row + rows, column : column + columns]


def plan_of(needs, architecture, layout, dtype, bucket):
    """`needs`: required slices, of each server and rank; equal tables of ranks are one object."""
    held = shard_table(architecture, layout)
    tables = {id(rank): needs_table(rank, held.tensors) for server in needs for rank in server}
    return TransferPlan([[tables[id(rank)] for rank in server] for server in needs], held, layout, dtype, bucket)


def numbered_rounds(transfers):
    """(round, message) of each."""
    rounds = np.unique(transfers.messages["round"]).tolist()
    return [(r, message) for r, sent in zip(rounds, transfers.rounds(), strict=True) for message in sent]


@pytest.mark.parametrize(("family", "layout", "tp"), CASES)
def test_every_server_rank_gets_every_number_that_it_holds_once(tiny_model, family, layout, tp):
    architecture = architecture_of(tiny_model, family)
    source, shapes = RandomWeights(architecture, 3), hf_shapes(architecture)
    held = shards(architecture, layout, source)
    needs = [server_needs(shapes, tp, architecture.kv_groups, architecture.delta_net)] * 2
    got = [[torch.full((need.rows, need.columns), torch.nan) for need in rank] for server in needs for rank in server]
    plan = plan_of(needs, architecture, layout, "float32", BUDGET)
    under_way = defaultdict(deque)
    for rank in range(layout.world_size):
        for number, message in numbered_rounds(plan.sends(rank)):
            cuts = [rectangle(held[rank][plan.held.parameters[part.of]], *part[1:]) for part in message.parts]
            under_way[rank, message.peer].append((number, cuts))
    for target in plan.targets:
        tensors = got[target - layout.world_size]
        for number, message in numbered_rounds(plan.receives(target)):
            # Messages between two ranks arrive in the order in which they were sent.
            sent, cuts = under_way[message.peer, target].popleft()
            assert sent == number
            for part, cut in zip(message.parts, cuts, strict=True):
                into = rectangle(tensors[part.of], *part[1:])
                assert into.isnan().all()
                into.copy_(cut)
    assert not any(under_way.values())
    assert plan.nbytes == 4 * sum(tensor.numel() for rank in got for tensor in rank)
    for rank_needs, tensors in zip((rank for server in needs for rank in server), got, strict=True):
        for need, tensor in zip(rank_needs, tensors, strict=True):
            assert torch.equal(tensor, rectangle(source.read(need.name), *need[1:])), need


@pytest.mark.parametrize(("family", "layout", "tp"), CASES)
def test_no_rank_has_more_than_a_bucket_on_its_way_in_a_round(tiny_model, family, layout, tp):
    architecture = architecture_of(tiny_model, family)
    needs = [server_needs(hf_shapes(architecture), tp, architecture.kv_groups)]
    bucket = 300_000
    plan = plan_of(needs, architecture, layout, "float32", bucket)
    ends = [*map(plan.sends, range(layout.world_size)), *map(plan.receives, plan.targets)]
    busy = [end for end in ends if len(end.messages)]
    assert max(end.messages["round"][-1] for end in busy) > 0
    for end in busy:
        assert (np.diff(end.messages["round"]) >= 0).all()
        assert 4 * np.bincount(end.messages["round"], weights=end.counts()).max() <= bucket


def test_a_round_ends_only_where_the_next_part_would_not_fit(tiny_model):
    architecture = architecture_of(tiny_model, "qwen3")
    needs = [server_needs(hf_shapes(architecture), 1, architecture.kv_groups)]
    received = plan_of(needs, architecture, Layout(), "float32", BUDGET).receives(1)
    sizes = {}
    for number, message in numbered_rounds(received):
        sizes |= {(part.of, part.row): (number, 4 * part.rows * part.columns) for part in message.parts}
    expected, filled = 0, 0
    for number, size in (sizes[place] for place in sorted(sizes)):
        if filled and filled + size > BUDGET:
            expected, filled = expected + 1, 0
        filled += size
        assert number == expected
    assert expected > 3


def test_small_parts_share_a_message_and_large_ones_have_their_own(tiny_model):
    architecture = architecture_of(tiny_model, "qwen3")
    needs = [server_needs(hf_shapes(architecture), 1, architecture.kv_groups)]
    plan = plan_of(needs, architecture, Layout(), "bfloat16", 2**30)
    (transfers,) = plan.receives(1).rounds()
    (small,) = (transfer for transfer in transfers if len(transfer.parts) > 1)
    assert all(2 * part.rows * part.columns < 2**16 for part in small.parts)
    large = [transfer.parts[0] for transfer in transfers if transfer is not small]
    assert all(2 * part.rows * part.columns >= 2**16 for part in large)


def test_servers_are_sent_to_by_different_copies(tiny_model):
    architecture, layout = architecture_of(tiny_model, "qwen3"), Layout(tp=2, dp=2)
    needs = [server_needs(hf_shapes(architecture), 2, architecture.kv_groups)] * 3
    plan = plan_of(needs, architecture, layout, "float32", BUDGET)
    senders = defaultdict(set)
    for target in plan.targets:
        senders[(target - layout.world_size) // 2] |= set(plan.receives(target).messages["peer"].tolist())
    assert senders == {0: {0, 1}, 1: {2, 3}, 2: {0, 1}}


@pytest.mark.parametrize(
    "need", [RequiredSlice("model.norm.weight", 0, 65, 0, 1), RequiredSlice("model.other.weight", 0, 1, 0, 1)]
)
def test_what_nobody_holds_is_refused(tiny_model, need):
    architecture, layout = architecture_of(tiny_model, "qwen3"), Layout()
    with pytest.raises(ValueError, match=need.name):
        plan_of([[[need]]], architecture, layout, "float32", BUDGET)


def test_experts_are_planned_together_and_not_one_by_one(tiny_model):
    few = architecture_of(tiny_model, "qwen3-moe")
    many = replace(few, experts=replace(few.experts, count=16 * few.experts.count))
    layout, counted = Layout(dp=2, ep=2), []
    for architecture in (few, many):
        held = shard_table(architecture, layout)
        ranks = server_needs(hf_shapes(architecture), 2, architecture.kv_groups)
        needs = [[needs_table(rank, held.tensors) for rank in ranks]]

        def work(needs=needs, held=held):
            plan = TransferPlan(needs, held, layout, "float32", 2**40)
            return plan.sends(1), plan.receives(2)

        counted.append(python_calls(work))
    assert counted[0] == counted[1]


@pytest.mark.parametrize(("shape", "part", "expected"), [
    ((6, 1, 4), (0, 2, 3, 0, 4), lambda own: own[2:5, 0]),
    ((6, 4), (0, 2, 3, 1, 2), lambda own: own[2:5, 1:3]),
    ((6,), (0, 2, 3, 0, 1), lambda own: own[2:5, None]),
])  # fmt: skip
def test_what_is_sent_of_parameters_of_one_to_three_dimensions_are_rectangles_of_their_rows(shape, part, expected):
    own, sender = torch.randn(shape), object.__new__(P2PSender)
    sender._parameters = {0: "parameter"}
    gatherer = SimpleNamespace(own={"parameter": own}.__getitem__, dtype=own.dtype)
    (cut,) = sender._cuts(gatherer, Transfer(1, (Slice(*part),)))
    assert torch.equal(cut, expected(own)) and cut.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
