import json
from dataclasses import replace
from pathlib import Path

import pytest

from exprl_megatron.config.policy import Layout
from exprl_megatron.errors import UserError
from exprl_megatron.policy.architecture import Architecture, RopeScaling, layout_violations, read_architecture

LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def written(directory: Path, tree: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(tree))
    return directory


def test_llama_3_with_its_rope_scaling(tmp_path):
    assert read_architecture(written(tmp_path, LLAMA_32_1B)) == Architecture(
        family="llama",
        layers=16,
        hidden=2048,
        heads=32,
        kv_groups=8,
        head_dim=64,
        ffn=8192,
        vocabulary=128256,
        norm_eps=1e-5,
        rope_base=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        qk_norm=False,
        qkv_bias=False,
        tied=True,
        max_positions=131072,
        initializer_range=0.02,
    )


def test_qwen3_has_norms_on_query_and_key_and_a_head_size_of_its_own(tmp_path):
    architecture = read_architecture(written(tmp_path, QWEN3))
    assert (architecture.qk_norm, architecture.qkv_bias, architecture.head_dim) == (True, False, 128)
    assert (architecture.rope_base, architecture.rope_scaling) == (1000000, None)


def test_qwen2_has_biases_and_its_head_size_follows_from_the_hidden_size(tmp_path):
    tree = QWEN3 | {"architectures": ["Qwen2ForCausalLM"]}
    del tree["head_dim"]
    architecture = read_architecture(written(tmp_path, tree))
    assert (architecture.qk_norm, architecture.qkv_bias, architecture.head_dim) == (False, True, 64)


def test_rope_settings_are_read_under_their_newer_name_too(tmp_path):
    tree = {k: v for k, v in LLAMA_32_1B.items() if not k.startswith("rope")}
    tree["rope_parameters"] = LLAMA_32_1B["rope_scaling"] | {"rope_theta": 500000.0}
    newer = read_architecture(written(tmp_path, tree))
    assert newer == read_architecture(written(tmp_path, LLAMA_32_1B))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "describes the architecture MambaForCausalLM; use one of"),
        ({"hidden_act": "gelu"}, "has hidden_act gelu"),
        ({"mlp_bias": True}, "has mlp_bias"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"use_sliding_window": True}, "has use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "has rope type yarn"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has quantization_config"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        read_architecture(written(tmp_path, LLAMA_32_1B | change))


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_architecture(tmp_path)


def test_a_config_that_is_cut_off_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32_1B)[:50])
    with pytest.raises(UserError, match="is not JSON"):
        read_architecture(tmp_path)


def test_a_config_without_a_size_is_refused(tmp_path):
    tree = {k: v for k, v in LLAMA_32_1B.items() if k != "hidden_size"}
    with pytest.raises(UserError, match="lacks 'hidden_size'"):
        read_architecture(written(tmp_path, tree))


def test_a_fitting_layout_has_no_violations_whatever_the_vocabulary(tmp_path):
    architecture = replace(read_architecture(written(tmp_path, LLAMA_32_1B)), vocabulary=128257)
    assert layout_violations(architecture, Layout(tp=8, pp=2, vpp=4, sequence_parallel=True)) == []


def test_all_violations_are_listed_each_with_value_and_remedy(tmp_path):
    architecture = read_architecture(written(tmp_path, LLAMA_32_1B))
    found = layout_violations(architecture, Layout(tp=3, pp=3))
    assert len(found) == 4
    assert found[0].startswith("policy.layout.tp is 3, which does not divide the model's 32 attention heads;")
    assert found[1].endswith("the model's 8 KV groups; use one of 1, 2, 4, 8.")
    assert found[3].startswith("policy.layout.pp x vpp is 3, which does not divide the model's 16 layers;")
