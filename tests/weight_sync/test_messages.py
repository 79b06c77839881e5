"""What a sync sends, without weights: against Megatron's own groups and shapes, and the sizes of a 70B."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.meta import meta_chunks, pretend_world

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import hf_shapes, parameters
from exprl_megatron.models.shards import ITEMSIZE, copies, holders, shard_shape
from exprl_megatron.planning.hardware import find_gpu
from exprl_megatron.planning.sync_broadcast import _pipelined, plan_sync
from exprl_megatron.planning.sync_p2p import plan_direct
from exprl_megatron.weight_sync.messages import rounds, stage_messages
from exprl_megatron.weight_sync.weight_exporter import view

LLAMA_70B = read_architecture(Path(planning.__file__).parent / "architectures" / "llama-3.3-70b")
LAYOUTS = [Layout(), Layout(tp=2), Layout(tp=2, pp=2, vpp=2, dp=2), Layout(pp=4)]
EXPERT_LAYOUT = Layout(tp=2, pp=2, dp=2, ep=2, etp=2, sequence_parallel=True)
MIB = 2**20


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp8", [False, True])
def test_every_tensor_is_in_one_message_of_its_stage(tiny_model, layout, fp8):
    architecture = replace(read_architecture(tiny_model("qwen3", tied=True)), layers=4)
    shapes = hf_shapes(architecture)
    staged = stage_messages(architecture, layout, "bfloat16", 60_000, fp8=fp8)
    slots = [slot for messages in staged for message in messages for slot in message.slots]
    sent = {slot.name: slot for slot in slots}
    assert len(sent) == len(slots)
    scales = {name for name in sent if name.endswith("_scale_inv")}
    assert sent.keys() - scales == shapes.keys()
    assert all(sent[name].shape == shapes[name] for name in shapes)
    assert bool(scales) == fp8
    for name in scales:
        weight = sent[name.removesuffix("_scale_inv")]
        assert (weight.dtype, sent[name].dtype) == ("float8_e4m3fn", "float32")
        assert sent[name].shape == tuple(-(-size // 128) for size in weight.shape)
    for stage, messages in enumerate(staged):
        assert {(p.pp_rank, message.stage) for message in messages for p in message.parameters} == {(stage, stage)}


@pytest.mark.parametrize("fp8", [False, True])
def test_a_message_s_tensors_are_contiguous_and_aligned(tiny_model, fp8):
    (messages,) = stage_messages(read_architecture(tiny_model("llama")), Layout(), "bfloat16", 50_000, fp8=fp8)
    assert len(messages) > 2
    for message in messages:
        ends = [slot.start + slot.nbytes for slot in message.slots]
        assert [slot.start for slot in message.slots] == [0, *ends[:-1]]
        assert message.nbytes == ends[-1]
        assert all(slot.start % ITEMSIZE[slot.dtype] == 0 for slot in message.slots)
        data = torch.arange(message.nbytes) % 100
        parts = [view(data.to(torch.uint8), slot).reshape(-1).view(torch.uint8) for slot in message.slots]
        assert torch.equal(torch.cat(parts).long(), data)


def test_scales_in_fp32_are_aligned_behind_matrices_of_an_odd_number_of_bytes(tiny_model):
    architecture = replace(read_architecture(tiny_model("llama")), hidden=65, ffn=131, layers=2)
    (messages,) = stage_messages(architecture, Layout(), "bfloat16", 50_000, fp8=True)
    slots = [slot for message in messages for slot in message.slots]
    assert any(slot.dtype == "float8_e4m3fn" and slot.nbytes % 4 for slot in slots)
    assert all(slot.start % ITEMSIZE[slot.dtype] == 0 for slot in slots)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param("qwen3", Layout(tp=2, pp=2, dp=2, cp=2), marks=pytest.mark.slow),
        pytest.param("qwen3-moe", EXPERT_LAYOUT, marks=pytest.mark.slow),
        ("mixtral", Layout(dp=2, ep=2, pp=2)),
        ("qwen3", Layout(cp=2, dp=2)),
        ("qwen3-moe", Layout(tp=2, dp=2, ep=2, sequence_parallel=True)),
        ("qwen3-moe", Layout(dp=4, ep=2, etp=2)),
    ],
)
def test_holders_and_their_copies_are_those_of_megatron_s_own_groups(tiny_model, family, layout):
    from megatron.core import parallel_state

    architecture = replace(read_architecture(tiny_model(family)), layers=2)
    table = [entry for entry in parameters(architecture, layout) if entry.exported]
    expected: dict[int, dict[int, list[int]]] = {}
    for rank in range(layout.world_size):
        with pretend_world(layout, rank) as world:
            for number, entry in enumerate(table):
                if entry.pp_rank != world.pp_rank:
                    continue
                if entry.ep_rank not in (None, world.ep_rank):
                    continue
                shard = world.tp_rank if entry.ep_rank is None else world.etp_rank
                first = parallel_state.get_expert_data_parallel_rank() == 0
                if entry.ep_rank is None:
                    first = world.dp_rank == world.cp_rank == 0
                found = expected.setdefault(number, {}).setdefault(shard, [])
                assert first == (not found), "ranks come in the order of their copies"
                found.append(rank)
    for number, entry in enumerate(table):
        ranks = [expected[number][shard] for shard in sorted(expected[number])]
        if entry.ep_rank is None and entry.rule.split_dim is None:
            assert holders(entry, layout) == (ranks[0][0],), entry.name
            continue
        assert holders(entry, layout) == tuple(first for first, *_ in ranks), entry.name
        assert [list(copies(entry, rank, layout)) for rank in holders(entry, layout)] == ranks, entry.name


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", Layout(tp=2, pp=2)), pytest.param("qwen3-moe", EXPERT_LAYOUT, marks=pytest.mark.slow)],
)
def test_shards_have_megatron_s_shapes(tiny_model, family, layout):
    architecture = replace(read_architecture(tiny_model(family, vocab_size=127)), layers=2)
    shapes = hf_shapes(architecture)
    for rank in range(layout.world_size):
        with pretend_world(layout, rank) as world:
            config = PolicyConfig(model="none", layout=layout)
            chunks = [dict(c.named_parameters()) for c in meta_chunks(architecture, config, world)]
            for entry in parameters(architecture, layout):
                if entry.pp_rank == world.pp_rank and entry.ep_rank in (None, world.ep_rank):
                    assert shard_shape(entry, shapes, layout) == tuple(chunks[entry.chunk][entry.name].shape)


def test_rounds_take_one_message_of_each_stage_as_long_as_there_are():
    assert rounds([["a", "b", "c"], ["d"]]) == [("a", "d"), ("b",), ("c",)]


class TestPlanOf70B:
    """Llama-3.3-70B in bf16 from TP4 x PP4 x DP4 (8 nodes) to two servers of TP8."""

    LAYOUT = Layout(tp=4, pp=4, dp=4, sequence_parallel=True)
    BUCKET = 2304 * MIB
    # config.json: 80 layers of 8192, 64 heads and 8 groups of 128, 28672, 128256 words, head not tied.
    LAYER = 2 * 8192 * (64 * 128 + 8 * 128) + 3 * 8192 * 28672 + 2 * 8192
    WORDS = 128256 * 8192
    BYTES = 2 * (80 * LAYER + 2 * WORDS + 8192)

    def plan(self, colocated: bool):
        return plan_sync(
            LLAMA_70B,
            self.LAYOUT,
            "bfloat16",
            self.BUCKET,
            find_gpu("h100"),
            servers=2,
            server_tp=8,
            colocated=colocated,
        )

    @pytest.mark.parametrize("colocated", [False, True])
    def test_no_rank_holds_more_than_its_shard_and_two_buckets(self, colocated):
        plan = self.plan(colocated)
        assert plan.nbytes == self.BYTES
        assert len(plan.held) == 64
        assert all(plan.held[rank] <= plan.shard[rank] + 2 * self.BUCKET for rank in plan.held)
        holding = {rank for rank in plan.held if plan.held[rank] > plan.shard[rank]}
        assert holding == (set(range(16)) if colocated else {0, 16, 32, 48})
        # Of a middle stage: 20 layers, matrices cut in four, norms not.
        assert plan.shard[16] == 2 * 20 * ((self.LAYER - 2 * 8192) // 4 + 2 * 8192)

    def test_separate_servers_take_every_byte_once_over_one_card(self):
        plan = self.plan(False)
        assert plan.over_network["server 0 in"] == plan.over_network["server 1 in"] == self.BYTES
        assert plan.over_network["server 0 out"] == self.BYTES and "server 1 out" not in plan.over_network
        # Stages gather within their nodes, so only senders use their cards, each for its own stage.
        assert {name for name in plan.over_network if name.startswith("trainer")} == {
            f"trainer {rank} out" for rank in (0, 16, 32, 48)
        }
        assert plan.over_network["trainer 16 out"] == 2 * 20 * self.LAYER
        assert sum(size for name, size in plan.over_network.items() if name.startswith("trainer")) == self.BYTES
        # 400 Gb/s at the 0.9 that NCCL reaches.
        assert self.BYTES / 45e9 < plan.seconds <= 6.0

    def test_colocated_servers_take_from_the_trainer_rank_on_each_gpu_what_other_nodes_sent_it(self):
        plan = self.plan(True)
        other_stages = self.BYTES - 2 * (20 * self.LAYER + self.WORDS)
        # Rank 0's node has the first copies of the first stage; rank 8's has none.
        assert plan.over_network["trainer 0 in"] == other_stages
        cut = 2 * 20 * (self.LAYER - 2 * 8192) + 2 * self.WORDS
        assert plan.over_network["trainer 8 in"] == other_stages + cut + 2 * 20 * 2 * 8192
        assert {name for name in plan.over_network if name.endswith(" in")} == {"trainer 0 in", "trainer 8 in"}
        # From there each rank of a server's node hands everything on to the next.
        assert all(plan.received[rank] == self.BYTES for rank in (*range(1, 8), *range(9, 16)))
        assert plan.seconds <= 4.0

    def test_directly_each_server_rank_gets_an_eighth_by_its_own_card(self):
        plan = plan_direct(LLAMA_70B, self.LAYOUT, "bfloat16", self.BUCKET, find_gpu("h100"), servers=2, server_tp=8)
        # Norms are whole on every rank.
        norms = 2 * (80 * 2 * 8192 + 8192)
        into = [size for name, size in plan.over_network.items() if name.startswith("server")]
        assert len(into) == 16 and set(into) == {(self.BYTES - norms) // 8 + norms}
        # Sixteen shards; each of two servers gets them from copies of its own.
        assert len(plan.sent) == 32 and sum(plan.sent.values()) == sum(into)
        assert max(plan.sent.values()) <= max(plan.shard.values()) + 7 * norms
        assert all(plan.held[rank] <= plan.shard[rank] + 2 * self.BUCKET for rank in plan.held)
        assert into[0] / 45e9 < plan.seconds <= 0.6


def test_a_round_is_gathered_while_the_one_before_is_taken():
    # 1 s for the first, then the slower of gathering a round and taking the one before, then taking the last.
    assert _pipelined([1.0, 2.0, 9.0], [3.0, 4.0, 1.0]) == 1.0 + 3.0 + 9.0 + 1.0
