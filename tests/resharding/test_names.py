from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.architecture import read_architecture
from exprl_megatron.resharding.names import (
    GateUp,
    QueryKeyValue,
    Rule,
    Vocabulary,
    hf_shapes,
    parameters,
)

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(tiny_model, family, tied):
    directory = tiny_model(family, tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert hf_shapes(read_architecture(directory)) == theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(pp=2, vpp=2), Layout(tp=2, pp=4)])
def test_every_tensor_is_exported_once_in_the_order_of_the_model(tiny_model, family, tied, layout):
    architecture = replace(read_architecture(tiny_model(family, tied=tied)), layers=4)
    table = parameters(architecture, layout)
    exported = [name for entry in table if entry.exported for name in entry.hf_names]
    assert exported == list(hf_shapes(architecture))
    assert max(Counter((e.pp_rank, e.chunk, e.name) for e in table).values()) == 1
    copies = [entry for entry in table if not entry.exported]
    assert [e.name for e in copies] == (["output_layer.weight"] if tied and layout.pp > 1 else [])


def test_interleaved_stages_take_turns(tiny_model):
    architecture = replace(read_architecture(tiny_model("llama")), layers=8)
    norms = [
        e for e in parameters(architecture, Layout(pp=2, vpp=2)) if e.hf_names[0].endswith("input_layernorm.weight")
    ]
    places = [(entry.pp_rank, entry.chunk, entry.name.split(".")[2]) for entry in norms]
    assert places == [(p, c, n) for c in (0, 1) for p in (0, 1) for n in ("0", "1")]


def test_queries_keys_and_values_lie_together_by_group():
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
