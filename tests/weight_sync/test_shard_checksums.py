"""Checksums from shards: a server that holds the right weights has them, and any other byte changes its tensor's."""

import zlib
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from helpers.loaded_shards import CASES, architecture_of, shards

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.weight_readers import RandomWeights
from exprl_megatron.policy.world import World
from exprl_megatron.serving.checksums import differing, rank_checksums
from exprl_megatron.serving.model_checksums import Expected, checksums, pack_expected
from exprl_megatron.serving.weight_hash import Sha256
from exprl_megatron.serving.weight_layout import served_dtype, server_parameters
from exprl_megatron.weight_sync.shard_checksums import as_checksums, own_sums, plan_checksums

GATE = ("weight", "e_score_correction_bias")


class Unlike(RandomWeights):
    """Norms and biases are drawn too, so that no two tensors are alike."""

    def read(self, name, dim=0, start=0, stop=None):
        whole = super().read(name)
        if whole.dim() == 1:
            whole = torch.randn(whole.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        return whole[start:stop] if dim == 0 else whole[:, start:stop]


def rank_of(layout, rank):
    return World(layout, torch.device("cpu"), rank, tp_rank=0, pp_rank=0, dp_rank=0)


def model_of(server, source, shapes):
    """One rank's parameters, put together by the layout's rules."""
    held = [torch.full(shape, torch.nan) for shape in server.shapes.values()]
    grids = [tensor.view(-1, tensor.shape[-1] if tensor.dim() > 1 else 1) for tensor in held]

    def place(number, row, rows, column, columns):
        into = grids[number][row : row + rows, column : column + columns]
        assert into.isnan().all(), "parts do not overlap"
        return into

    names = list(shapes)
    for (tensor, row, rows, column, columns), where in zip(server.needs.tolist(), server.places.tolist(), strict=True):
        whole = source.read(names[tensor])
        part = whole.view(len(whole), -1)[row : row + rows, column : column + columns]
        plus_one = list(server.shapes)[where[0]].endswith(".gemma_weight")
        place(*where).copy_(part + 1 if plus_one else part)
    for where in server.padding.tolist():
        place(*where).zero_()
    return dict(zip(server.shapes, held, strict=True))


def expected_of(tiny_model, family, layout, tp):
    """What all ranks' shards say: checksums, what servers receive, and the models of a server's ranks."""
    architecture = architecture_of(tiny_model, family)
    source = Unlike(architecture, 3)
    held = shards(architecture, layout, source)
    plans = [plan_checksums(architecture, rank_of(layout, rank), tp) for rank in range(layout.world_size)]
    sums = [
        own_sums(plan, SimpleNamespace(own=held[rank].__getitem__, dtype=torch.float32), rank_of(layout, rank))
        for rank, plan in enumerate(plans)
    ]
    plan = plans[0]
    told = [
        pack_expected(s.shapes, ["float32"] * len(s.shapes), parts)
        for s, parts in zip(plan.servers, plan.parts, strict=True)
    ]
    return as_checksums(plan, sums), told, [model_of(s, source, hf_shapes(architecture)) for s in plan.servers]


@pytest.mark.parametrize("server", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("family", "tp"),
    [
        ("qwen3", 1),
        ("qwen3", 4),
        ("qwen2", 2),
        ("qwen3-moe", 2),
        ("mixtral", 2),
        ("qwen3.5", 1),
        ("qwen3.5", 2),
        ("qwen3.5-moe", 2),
    ],
)
def test_a_rank_s_parameters_are_those_whose_checksums_sglang_reports(tiny_model, family, tp, server):
    architecture = architecture_of(tiny_model, family)
    source, shapes = Unlike(architecture, 3), hf_shapes(architecture)
    settings = {"tp": tp, "kv_heads": architecture.kv_groups, "delta_net": architecture.delta_net}
    experts = architecture.experts.count if architecture.experts else 0
    reported = rank_checksums(
        [(name, source.read(name)) for name in shapes],
        tied=architecture.tied,
        experts=experts,
        server=server,
        **settings,
    )
    for rank, expected in zip(server_parameters(shapes, server=server, **settings), reported, strict=True):
        model = model_of(rank, source, shapes)
        if server == "cpu":
            assert {name: sha256(tensor) for name, tensor in model.items()} == expected
        else:
            assert model.keys() == expected.keys()
        assert not any(tensor.isnan().any() for tensor in model.values())


def sha256(tensor):
    digest = Sha256()
    digest.update(tensor.reshape(-1).view(torch.uint8))
    return digest.hexdigest()


@pytest.mark.parametrize(("family", "layout", "tp"), CASES)
def test_shards_of_every_layout_and_a_server_s_model_have_the_same_checksums(tiny_model, family, layout, tp):
    expected, told, models = expected_of(tiny_model, family, layout, tp)
    assert len(expected) == tp
    for wanted, packed, model in zip(expected, told, models, strict=True):
        assert differing(checksums(model, packed), wanted) == []


@pytest.mark.parametrize(
    ("family", "layout", "tp"),
    [
        ("qwen3", Layout(tp=2), 1),
        ("qwen2", Layout(tp=2, pp=2), 2),
        ("qwen3.5", Layout(tp=2), 2),
        ("qwen3.5-moe", Layout(tp=2), 2),
    ],
)
def test_one_bit_anywhere_is_found_and_its_tensor_named(tiny_model, family, layout, tp):
    expected, told, models = expected_of(tiny_model, family, layout, tp)
    draw = np.random.default_rng(0)
    for wanted, packed, model in zip(expected, told, models, strict=True):
        for name, tensor in model.items():
            octets = tensor.view(-1).view(torch.uint8)
            place, bit = int(draw.integers(len(octets))), 1 << int(draw.integers(8))
            octets[place] ^= bit
            assert differing(checksums(model, packed), wanted) == [name]
            octets[place] ^= bit


def test_numbers_in_each_other_s_place_are_found(tiny_model):
    (wanted,), (packed,), (model,) = expected_of(tiny_model, "qwen3", Layout(tp=2), 1)
    gate_up = next(name for name in model if "gate_up" in name)
    gate, up = model[gate_up].chunk(2)
    gate[:], up[:] = up.clone(), gate.clone()
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    model[first], model[second] = model[second], model[first]
    assert differing(checksums(model, packed), wanted) == sorted([gate_up, first, second])


def test_padding_that_is_not_zero_is_found(tiny_model):
    expected, told, models = expected_of(tiny_model, "llama", Layout(pp=2, vpp=2, dp=2), 4)
    # The vocabulary of 127 is padded to 128: the last row of the last rank.
    models[3]["lm_head.weight"][-1, 5] = -0.0
    found = [differing(checksums(m, t), wanted) for m, t, wanted in zip(models, told, expected, strict=True)]
    assert found == [[], [], [], ["lm_head.weight"]]


def test_missing_surplus_and_other_tensors_are_named(tiny_model):
    (wanted,), (packed,), (model,) = expected_of(tiny_model, "qwen3", Layout(), 1)
    del model["model.norm.weight"]
    model["lm_head.weight"] = model["lm_head.weight"].bfloat16()
    model["model.embed_tokens.weight"] = model["model.embed_tokens.weight"].T
    model["another"] = torch.zeros(3)
    found = checksums(model, packed)
    names = ["another", "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert differing(found, wanted) == names
    assert found["another"] == "not expected" and found["lm_head.weight"].startswith("bfloat16 [")


def test_parts_that_leave_something_out_are_refused(tiny_model):
    plan = plan_checksums(architecture_of(tiny_model, "qwen3"), rank_of(Layout(), 0), 1)
    (server,), (parts,) = plan.servers, plan.parts
    name = list(server.shapes)[parts[-1]["of"]]
    with pytest.raises(ValueError, match=rf"the parts of {name}, of shape .*, have \d+ numbers"):
        pack_expected(server.shapes, ["float32"] * len(server.shapes), parts[:-1])


def test_what_a_trainer_of_another_version_says_is_refused(tiny_model):
    (_,), (packed,), (model,) = expected_of(tiny_model, "qwen3", Layout(), 1)
    read = msgspec.msgpack.decode(packed, type=Expected)
    name, (rows, columns) = next((n, s) for n, s in read.shapes.items() if len(s) == 2)
    smaller = msgspec.structs.replace(read, shapes=read.shapes | {name: (rows - 1, columns)})
    with pytest.raises(ValueError, match="is outside what it is a part of"):
        checksums(model, msgspec.msgpack.encode(smaller))


def test_copies_of_a_shard_share_its_parts(tiny_model):
    architecture = architecture_of(tiny_model, "llama")
    one = plan_checksums(architecture, rank_of(Layout(), 0), 1)
    four = [plan_checksums(architecture, rank_of(Layout(dp=4), rank), 1) for rank in range(4)]
    assert sum(len(plan.places) for plan in four) == len(one.places)
    assert max(len(plan.places) for plan in four) <= len(one.places) // 4 + 1


def test_a_router_that_servers_keep_wider_than_the_policy_has_the_checksum_of_its_wider_numbers(tiny_model):
    architecture = architecture_of(tiny_model, "glm4-moe")
    source, layout = Unlike(architecture, 3), Layout()
    held = {
        parameter: tensor if parameter.is_buffer else tensor.bfloat16()
        for parameter, tensor in shards(architecture, layout, source)[0].items()
    }
    plan = plan_checksums(architecture, rank_of(layout, 0), 1)
    gatherer = SimpleNamespace(own=held.__getitem__, dtype=torch.bfloat16)
    (wanted,) = as_checksums(plan, [own_sums(plan, gatherer, rank_of(layout, 0))])
    (server,) = plan.servers
    dtypes = [served_dtype(name, "bfloat16", sigmoid_router=True) for name in server.shapes]
    wide = [name for name, dtype in zip(server.shapes, dtypes, strict=True) if dtype == "float32"]
    gates = [f"model.layers.{layer}.mlp.gate.{part}" for layer in (1, 2, 3) for part in GATE]
    assert sorted(wide) == sorted(gates)
    model = {
        name: tensor if name.endswith(GATE[1]) else tensor.bfloat16().float() if name in gates else tensor.bfloat16()
        for name, tensor in model_of(server, source, hf_shapes(architecture)).items()
    }
    packed = pack_expected(server.shapes, dtypes, plan.parts[0])
    assert differing(checksums(model, packed), wanted) == []
    narrow = model | {gates[0]: model[gates[0]].bfloat16()}
    assert differing(checksums(narrow, packed), wanted) == [gates[0]]
