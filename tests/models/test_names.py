from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import (
    GateUp,
    QueryKeyValue,
    Rule,
    Vocabulary,
    hf_shapes,
    parameters,
)

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "mistral", "seed-oss")
UNTIED = ("qwen3-moe", "mixtral")
TIED_OR_NOT = [
    (family, tied)
    for family in (*FAMILIES, "qwen3.5", "qwen3.5-moe")
    for tied in (False, True)
    if not (tied and family in UNTIED)
] + [(family, False) for family in ("glm4-moe", "olmo3")]
"""Embeddings of GLM-4.5 and Olmo 3 are not tied either."""


@pytest.mark.parametrize(("family", "tied"), TIED_OR_NOT)
def test_names_and_shapes_are_those_that_transformers_writes(tiny_model, family, tied):
    directory = tiny_model(family, tied=tied)
    theirs = {name: tuple(tensor.shape) for name, tensor in load_file(directory / "model.safetensors").items()}
    assert hf_shapes(read_architecture(directory)) == theirs


@pytest.mark.parametrize(("family", "tied"), TIED_OR_NOT)
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(pp=2, vpp=2), Layout(tp=2, pp=4)])
def test_every_tensor_is_exported_once_in_the_order_of_the_model(tiny_model, family, tied, layout):
    architecture = read_architecture(tiny_model(family, tied=tied, layers=4))
    table = parameters(architecture, layout)
    exported = [name for entry in table if entry.exported for name in entry.hf_names]
    assert exported == list(hf_shapes(architecture))
    assert max(Counter((e.pp_rank, e.chunk, e.name) for e in table).values()) == 1
    copies = [entry for entry in table if not entry.exported]
    assert [e.name for e in copies] == (["output_layer.weight"] if tied and layout.pp > 1 else [])


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "glm4-moe", "qwen3.5-moe"])
def test_each_expert_lives_on_one_expert_parallel_rank_under_its_number_there(tiny_model, family):
    architecture = read_architecture(tiny_model(family))
    layout = Layout(dp=2, ep=2)
    names = {
        (entry.ep_rank, name.removeprefix("decoder.layers.1.mlp.experts."), entry.hf_names[-1].split("experts.")[1][0])
        for entry in parameters(architecture, layout)
        if "linear_fc2" in (name := entry.name) and name.startswith("decoder.layers.1.mlp.experts.")
    }
    assert names == {(e // 2, f"local_experts.{e % 2}.linear_fc2.weight", str(e)) for e in range(4)}
    grouped = {entry.name for entry in parameters(architecture, layout, grouped=True) if entry.ep_rank == 1}
    assert "decoder.layers.1.mlp.experts.linear_fc1.weight1" in grouped


@pytest.mark.parametrize("pp", [2, 4])
def test_a_stage_with_embedding_or_output_layer_may_hold_a_layer_less(tiny_model, pp):
    architecture = replace(read_architecture(tiny_model("llama")), layers=6)
    layout = Layout(pp=pp, vpp=4 // pp, embedding_as_layer=True, head_as_layer=True)
    norms = [e for e in parameters(architecture, layout) if e.hf_names[0].endswith("input_layernorm.weight")]
    stages = [entry.chunk * pp + entry.pp_rank for entry in norms]
    assert stages == [0, 1, 1, 2, 2, 3]


def test_interleaved_stages_take_turns(tiny_model):
    architecture = replace(read_architecture(tiny_model("llama")), layers=8)
    norms = [
        e for e in parameters(architecture, Layout(pp=2, vpp=2)) if e.hf_names[0].endswith("input_layernorm.weight")
    ]
    places = [(entry.pp_rank, entry.chunk, entry.name.split(".")[2]) for entry in norms]
    assert places == [(p, c, n) for c in (0, 1) for p in (0, 1) for n in ("0", "1")]


def test_queries_keys_and_values_are_together_by_group():
    rule = QueryKeyValue(heads_per_group=2, head_dim=1)
    query, key, value = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20]), torch.tensor([100.0, 200])
    merged = rule.merge([query, key, value])
    assert merged.tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert all(torch.equal(a, b) for a, b in zip(rule.parts(merged), (query, key, value), strict=True))


def cut(tensor: torch.Tensor, dim: int | None, ranks: int) -> list[torch.Tensor]:
    return [tensor] * ranks if dim is None else list(tensor.chunk(ranks, dim))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (Rule(), [(7,)]),
        (Rule(split_dim=1), [(5, 6)]),
        (GateUp(), [(6, 5), (6, 5)]),
        (QueryKeyValue(heads_per_group=3, head_dim=2), [(36, 5), (12, 5), (12, 5)]),
        (QueryKeyValue(heads_per_group=3, head_dim=2), [(36,), (12,), (12,)]),
    ],
)
def test_what_is_cut_and_merged_joins_to_the_same(rule, shapes, ranks):
    tensors = [torch.randn(shape) for shape in shapes]
    parts = [cut(tensor, rule.split_dim, ranks) for tensor in tensors]
    shards = [rule.merge([part[rank] for part in parts]) for rank in range(ranks)]
    joined = rule.join(shards)
    assert all(torch.equal(a, b) for a, b in zip(joined, tensors, strict=True))


def test_padding_of_the_vocabulary_is_cut_off():
    embedding = torch.randn(5, 2)
    shards = [embedding[:3], torch.cat([embedding[3:], torch.zeros(1, 2)])]
    assert torch.equal(Vocabulary(rows=5).join(shards)[0], embedding)
