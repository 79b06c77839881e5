import json
from dataclasses import asdict, replace

import pytest

from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.recorded import differing_fields

FORMER = {
    "family": "qwen3-moe",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_groups": 2,
    "head_dim": 16,
    "ffn": 96,
    "vocabulary": 128,
    "norm_eps": 1e-05,
    "rope_base": 10000.0,
    "rope_scaling": None,
    "qk_norm": True,
    "qkv_bias": False,
    "tied": False,
    "max_positions": 1024,
    "initializer_range": 0.02,
    "experts": {"count": 4, "chosen": 2, "ffn": 48, "normalised": True},
}
"""What checkpoints had in them before layers could differ."""


def test_a_record_of_an_earlier_version_is_of_the_same_model(tiny_model):
    architecture = read_architecture(tiny_model("qwen3-moe"))
    assert differing_fields(FORMER, architecture) == []
    assert differing_fields(json.loads(json.dumps(asdict(architecture))), architecture) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"layers": 3}, "layers"),
        ({"rotary_share": 0.5}, "rotary_share"),
        ({"experts": FORMER["experts"] | {"count": 8}}, "experts"),
        ({"experts": None}, "experts"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_record_of_another_model_differs_in_the_field(tiny_model, change, name):
    assert differing_fields(FORMER | change, read_architecture(tiny_model("qwen3-moe"))) == [name]


def test_a_field_that_has_been_added_must_have_its_default(tiny_model):
    architecture = read_architecture(tiny_model("qwen3-moe"))
    shared = replace(architecture, experts=replace(architecture.experts, shared_ffn=48))
    assert differing_fields(FORMER, shared) == ["experts"]
