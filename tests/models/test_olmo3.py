"""Olmo 3: what its config.json says, and what is refused since one of the libraries computes it otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import layout_violations, read_architecture
from exprl_megatron.models.flops import attention_flops, linear_flops, model_flops, sequence_flops
from exprl_megatron.models.name_map import parameters
from exprl_megatron.models.rope import YarnScaling
from exprl_megatron.models.stored_parameters import stored_parameters
from exprl_megatron.planning.parameters import model_parameters

ARCHITECTURES = Path(planning.__file__).parent / "architectures"
PUBLISHED = json.loads((ARCHITECTURES / "olmo-3-32b" / "config.json").read_text())
TYPES = PUBLISHED["layer_types"]


def written(directory: Path, tree: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(tree))
    return directory


def without(*names: str) -> dict:
    return {key: value for key, value in PUBLISHED.items() if key not in names}


def test_the_larger_one_is_read_as_published():
    found = read_architecture(ARCHITECTURES / "olmo-3-32b")
    assert (found.heads, found.kv_groups, found.head_dim, found.window) == (40, 8, 128, 4096)
    assert found.post_norms and found.qk_norm and not found.qkv_bias and not found.tied
    assert found.rope_scaling == YarnScaling(8.0, 8192, 32.0, 1.0, True, pytest.approx(1.2079441541679836))


@pytest.mark.parametrize(("name", "billions"), [("olmo-3-7b", 7.298), ("olmo-3-32b", 32.234)])
def test_both_sizes_have_the_parameters_of_transformers(name, billions):
    config = transformers.AutoConfig.from_pretrained(ARCHITECTURES / name)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert model_parameters(read_architecture(ARCHITECTURES / name)) == count
    assert count / 1e9 == pytest.approx(billions, abs=1e-3)


def test_layers_with_windows_are_those_of_the_config_and_their_positions_are_not_stretched():
    architecture = read_architecture(ARCHITECTURES / "olmo-3-7b")
    kinds = [architecture.of_layer(layer) for layer in range(4)]
    assert [kind.window for kind in kinds] == [4096, 4096, 4096, None]
    assert [kind.rope_scaling is None for kind in kinds] == [True, True, True, False]
    assert list(architecture.kinds().values()) == [24, 8]
    assert list(architecture.kinds(range(2, 5)).values()) == [2, 1]
    assert kinds[0].of_layer(3) == kinds[0] and kinds[3].of_layer(0) == kinds[3]


def test_what_is_left_out_of_config_json_is_as_transformers_has_it(tmp_path):
    directory = written(tmp_path, without("layer_types", "sliding_window", "head_dim", "num_key_value_heads"))
    theirs, found = transformers.AutoConfig.from_pretrained(directory), read_architecture(directory)
    assert found.layer_types == tuple(theirs.layer_types)
    assert (found.window, found.kv_groups) == (theirs.sliding_window, theirs.num_key_value_heads) == (4096, 40)


def test_a_model_whose_positions_were_never_stretched_is_read(tmp_path):
    architecture = read_architecture(written(tmp_path, PUBLISHED | {"rope_scaling": None}))
    assert architecture.rope_scaling is None and architecture.attention_factor == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 10_000}, "has rope_theta 10000 instead of 500000"),
        ({"rope_theta": None}, "has rope_theta None instead of 500000"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "with which SGLang does not start"),
        ({"rope_scaling": PUBLISHED["rope_scaling"] | {"attention_factor": 1.0}}, "reads as attention factor 1 and"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "has rope type linear, where"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "has rope type dynamic, where"),
        ({"head_dim": 64}, "has head_dim 64, which SGLang does not read"),
        ({"hidden_size": 5000, "num_attention_heads": 48}, "has hidden_size 5000, which 48 heads do not divide"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"hidden_act": "gelu"}, "has hidden_act gelu"),
        ({"sliding_window": None}, "has sliding_window None"),
        ({"sliding_window": 1}, "has sliding_window 1"),
        ({"sliding_window": True}, "has sliding_window True"),
        ({"layer_types": TYPES[1:]}, "has 63 layer_types for 64 layers"),
        ({"layer_types": ["full_attention"] * 64}, "has layer_types full_attention, where both"),
        ({"layer_types": [*TYPES[:-1], "chunked_attention"]}, "has layer_types chunked_attention, full_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has quantization_config"),
    ],
    ids=str,
)
def test_what_one_of_the_libraries_would_compute_otherwise_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        read_architecture(written(tmp_path, PUBLISHED | change))


def test_a_base_that_is_left_out_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no rope_theta instead of 500000"):
        read_architecture(written(tmp_path, without("rope_theta")))


def test_the_base_of_layers_with_windows_is_what_it_is_whatever_the_config_says(tmp_path):
    """Where this fails transformers has been repaired, and other bases need not be refused."""
    config = transformers.AutoConfig.from_pretrained(written(tmp_path, PUBLISHED | {"rope_theta": 10_000}))
    bases = {kind: settings["rope_theta"] for kind, settings in config.rope_parameters.items()}
    assert bases == {"full_attention": 10_000, "sliding_attention": 500_000}


def test_context_parallelism_is_refused():
    architecture = read_architecture(ARCHITECTURES / "olmo-3-32b")
    (sentence,) = layout_violations(architecture, Layout(tp=8, cp=2, sequence_parallel=True))
    assert sentence.startswith("policy.layout.cp is 2 but attention of this olmo3 model has windows")
    assert layout_violations(architecture, Layout(tp=8, pp=2, sequence_parallel=True)) == []
    assert len(layout_violations(architecture, Layout(tp=16, sequence_parallel=True))) == 2


def test_norms_of_queries_and_keys_are_cut_as_heads_are_and_other_norms_are_whole():
    table = parameters(read_architecture(ARCHITECTURES / "olmo-3-7b"), Layout())
    norms = {
        entry.name.removeprefix("decoder.layers.0."): (entry.hf_names[0].split(".", 3)[3], entry.rule.split_dim)
        for entry in table
        if entry.name.startswith("decoder.layers.0.") and "norm" in entry.name
    }
    assert norms == {
        "self_attention.q_norm.weight": ("self_attn.q_norm.weight", 0),
        "self_attention.k_norm.weight": ("self_attn.k_norm.weight", 0),
        "self_attention.linear_proj.post_layernorm.weight": ("post_attention_layernorm.weight", None),
        "mlp.linear_fc2.post_layernorm.weight": ("post_feedforward_layernorm.weight", None),
    }


def test_layers_that_differ_in_their_attention_alone_are_in_one_tensor_of_megatron_s_files():
    keys = {stored.key: stored.counts for stored in stored_parameters(read_architecture(ARCHITECTURES / "olmo-3-7b"))}
    assert keys["decoder.layers.self_attention.q_norm.weight"] == (32,)
    assert len(keys) == 3 + 8


def test_attention_s_operations_stop_growing_at_the_window():
    architecture = read_architecture(ARCHITECTURES / "olmo-3-32b")
    window, full = architecture.of_layer(0), architecture.of_layer(3)
    short = attention_flops(full, 4096)
    assert attention_flops(window, 4096) == short
    # Tokens 0 to w - 1 see as in a sequence of that length, all others see w: twice as much as the mean of those.
    assert attention_flops(window, 16384) == pytest.approx((short * 1 + 2 * short * 3) / 4)
    assert attention_flops(full, 16384) == 4 * short
    of_attention = model_flops(architecture, 16384, training=False) - model_flops(architecture, 0.0, training=False)
    assert of_attention == pytest.approx(48 * 1.75 * short + 16 * 4 * short)
    stretched = replace(architecture, window=10**6)
    assert model_flops(stretched, 16384) > model_flops(architecture, 16384)


def test_a_sequence_s_operations_count_layers_with_windows_up_to_the_window():
    """Closed form of the 32B's 48 layers with windows of 4,096 and 16 without, 40 heads of 128."""
    architecture = read_architecture(ARCHITECTURES / "olmo-3-32b")
    assert (architecture.layers, architecture.window, architecture.heads, architecture.head_dim) == (64, 4096, 40, 128)
    of_linear = linear_flops(architecture) + 2 * 5120 * 100278
    for length, found in zip((1000, 4096, 16384), sequence_flops(architecture, (1000, 4096, 16384)), strict=True):
        window = min(length, 4096)
        # Pairs of a query and a key that it sees: the triangle of the first `window` tokens, then a band.
        pairs = 16 * length**2 / 2 + 48 * (window**2 / 2 + (length - window) * window)
        assert found == pytest.approx(length * of_linear + 4 * 40 * 128 * pairs, rel=1e-12)
        assert found == pytest.approx(length * model_flops(architecture, length, training=False), rel=1e-12)
