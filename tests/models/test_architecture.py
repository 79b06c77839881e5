import json
from dataclasses import replace
from pathlib import Path

import pytest

from exprl_megatron.config.policy import Layout, OptimizerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import (
    Architecture,
    Experts,
    layout_violations,
    read_architecture,
    stage_layers,
)
from exprl_megatron.models.rope import Llama3Scaling

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

QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    **{key: value for key, value in QWEN3.items() if key not in ("head_dim", "attention_bias")},
    "architectures": ["MixtralForCausalLM"],
    "tie_word_embeddings": False,
    "intermediate_size": 14336,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
MISTRAL = {
    **{key: value for key, value in QWEN3.items() if key not in ("attention_bias", "use_sliding_window")},
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 5120,
    "num_attention_heads": 32,
}
"""Heads of 128 as in Mistral Nemo and Small, where the hidden size would make them 160."""
SEED_OSS = {
    **{key: value for key, value in QWEN3.items() if key not in ("sliding_window", "use_sliding_window")},
    "architectures": ["SeedOssForCausalLM"],
    "attention_bias": True,
    "attention_out_bias": False,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "hidden_size": 5120,
    "mlp_bias": False,
    "num_attention_heads": 80,
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
        rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
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


def test_experts_of_qwen3_moe_are_narrower_than_its_dense_layers_would_be(tmp_path):
    architecture = read_architecture(written(tmp_path, QWEN3_MOE))
    assert architecture.experts == Experts(count=128, top_k=8, ffn=768, norm_topk_prob=True)
    assert (architecture.family, architecture.qk_norm) == ("qwen3-moe", True)
    plain = read_architecture(written(tmp_path, QWEN3_MOE | {"norm_topk_prob": False}))
    assert not plain.experts.norm_topk_prob


def test_the_number_of_experts_is_read_under_the_name_that_transformers_5_writes(tmp_path):
    tree = QWEN3_MOE | {"num_local_experts": 16}
    del tree["num_experts"]
    assert read_architecture(written(tmp_path, tree)).experts.count == 16


def test_mixtrals_experts_have_the_width_of_its_mlp(tmp_path):
    architecture = read_architecture(written(tmp_path, MIXTRAL))
    assert architecture.experts == Experts(count=8, top_k=2, ffn=14336, norm_topk_prob=True)


def test_mistral_is_llama_with_heads_of_a_size_of_their_own(tmp_path):
    architecture = read_architecture(written(tmp_path, MISTRAL))
    assert (architecture.family, architecture.head_dim, architecture.kv_groups) == ("mistral", 128, 8)
    assert not architecture.qk_norm and not architecture.qkv_bias


@pytest.mark.parametrize("head_dim", ["given", "left out", None])
def test_seed_oss_has_biases_and_heads_that_are_wider_than_the_hidden_size(tmp_path, head_dim):
    tree = SEED_OSS if head_dim == "given" else {k: v for k, v in SEED_OSS.items() if k != "head_dim"}
    if head_dim is None:
        tree = tree | {"head_dim": None}
    architecture = read_architecture(written(tmp_path, tree))
    assert (architecture.family, architecture.qkv_bias, architecture.qk_norm) == ("seed-oss", True, False)
    # Left out it is 128 in transformers, null means 5120 / 80.
    assert architecture.head_dim == (64 if head_dim is None else 128)


@pytest.mark.parametrize("tree", [QWEN3, MISTRAL, SEED_OSS])
def test_the_number_of_key_value_heads_is_guessed_for_llama_alone(tmp_path, tree):
    heads = tree["num_attention_heads"]
    lacking = {key: value for key, value in tree.items() if key != "num_key_value_heads"}
    with pytest.raises(UserError, match="lacks 'num_key_value_heads'"):
        read_architecture(written(tmp_path, lacking))
    assert read_architecture(written(tmp_path, tree | {"num_key_value_heads": None})).kv_groups == heads
    llama = {key: value for key, value in LLAMA_32_1B.items() if key != "num_key_value_heads"}
    assert read_architecture(written(tmp_path, llama)).kv_groups == 32


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (MISTRAL | {"sliding_window": 4096}, "has sliding_window 4096"),
        (
            {key: value for key, value in MISTRAL.items() if key != "sliding_window"},
            "has no sliding_window, which means a window of 4096 tokens",
        ),
        (MISTRAL | {"attention_bias": True}, "has attention_bias"),
        (SEED_OSS | {"attention_bias": False}, "has attention_bias false"),
        (SEED_OSS | {"attention_out_bias": True}, "has attention_out_bias"),
        (SEED_OSS | {"mlp_bias": True}, "has mlp_bias"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, "has dense layers between its layers of experts"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, "has dense layers between its layers of experts"),
        (QWEN3_MOE | {"num_experts_per_tok": 1}, "has one expert for each token, whose weight is always 1"),
        (MIXTRAL | {"sliding_window": 4096}, "has sliding_window 4096"),
    ],
)
def test_settings_of_a_family_that_are_not_supported_are_refused_by_name(tmp_path, tree, said):
    with pytest.raises(UserError, match=said):
        read_architecture(written(tmp_path, tree))


def test_rope_settings_are_read_under_their_newer_name_too(tmp_path):
    tree = {k: v for k, v in LLAMA_32_1B.items() if not k.startswith("rope")}
    tree["rope_parameters"] = LLAMA_32_1B["rope_scaling"] | {"rope_theta": 500000.0}
    newer = read_architecture(written(tmp_path, tree))
    assert newer == read_architecture(written(tmp_path, LLAMA_32_1B))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "describes the architecture MambaForCausalLM, which is not supported; ",
        ),
        ({"hidden_act": "gelu"}, "has hidden_act gelu"),
        ({"mlp_bias": True}, "has mlp_bias"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"use_sliding_window": True}, "has use_sliding_window"),
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


def test_layouts_of_experts_that_fit_have_no_violations(tmp_path):
    architecture = read_architecture(written(tmp_path, QWEN3_MOE))
    for layout in (Layout(dp=4, ep=4), Layout(tp=4, dp=8, ep=8, etp=4, sequence_parallel=True), Layout(tp=1, dp=16)):
        assert layout.violations(None) + layout_violations(architecture, layout) == []


def test_experts_must_divide_over_their_ranks_and_tokens_over_tensor_parallel_ones(tmp_path):
    architecture = read_architecture(written(tmp_path, QWEN3_MOE))
    layout = Layout(tp=2, dp=25, ep=5, etp=5)
    assert layout_violations(architecture, layout) == [
        "policy.layout.ep is 5, which does not divide the model's 128 experts; change it.",
        "policy.layout.etp is 5, which does not divide an expert's 768 columns; change it.",
    ]
    assert layout.violations(None) == ["policy.layout.ep with tp needs sequence_parallel; turn it on."]
    assert layout_violations(architecture, Layout(tp=2)) == [
        "policy.layout.tp is 2 and the model has experts, which needs sequence_parallel; turn it on."
    ]


def test_a_layout_of_experts_must_divide_the_ranks_of_a_stage(tmp_path):
    assert Layout(dp=6, ep=4).violations(None) == [
        "policy.layout.ep x etp is 4, which does not divide the 6 ranks of a pipeline stage (tp x cp x dp); "
        "change one of them."
    ]


def test_a_dense_model_has_no_experts_to_spread(tmp_path):
    found = layout_violations(read_architecture(written(tmp_path, QWEN3)), Layout(dp=4, ep=2, etp=2))
    assert found == [
        "policy.layout.ep is 2 but the model has no experts; set it to 1.",
        "policy.layout.etp is 2 but the model has no experts; set it to 1.",
    ]


def test_uneven_pipelines_count_embedding_and_output_layer_as_layers(tmp_path):
    architecture = replace(read_architecture(written(tmp_path, QWEN3)), layers=6)
    both = {"embedding_as_layer": True, "head_as_layer": True}
    assert layout_violations(architecture, Layout(pp=4, **both)) == []
    assert stage_layers(architecture, Layout(pp=4, **both)) == [
        [range(1)], [range(1, 3)], [range(3, 5)], [range(5, 6)],
    ]  # fmt: skip
    assert stage_layers(architecture, Layout(pp=2, vpp=2, **both)) == [
        [range(1), range(3, 5)], [range(1, 3), range(5, 6)],
    ]  # fmt: skip
    assert layout_violations(architecture, Layout(pp=4, embedding_as_layer=True)) == [
        "policy.layout.pp x vpp is 4, which does not divide the model's 7 layers with embedding or output layer "
        "counted in; change pp or vpp."
    ]
    assert layout_violations(architecture, Layout(pp=8, **both)) == [
        "policy.layout leaves the first or last stage without a layer; use fewer stages."
    ]
    assert Layout(head_as_layer=True).violations(None) == [
        "policy.layout.embedding_as_layer and head_as_layer need pp of 2 or more; leave them out."
    ]


@pytest.mark.parametrize("setting", [{"overlap": True}, {"offload": 0.5}])
def test_overlap_and_offload_need_a_distributed_optimizer(setting):
    assert OptimizerConfig(**setting).violations(None) == []
    (name,) = setting
    assert OptimizerConfig(distributed=False, **setting).violations(None) == [
        f"optimizer.{name} needs optimizer.distributed; turn that on, or leave {name} out."
    ]
