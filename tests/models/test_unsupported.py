"""Settings that would give another model than transformers', or than SGLang's, are refused in every family."""

import json
from pathlib import Path

import pytest

from exprl_megatron import planning
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture

ARCHITECTURES = Path(planning.__file__).parent / "architectures"
PUBLISHED = {
    name: json.loads((ARCHITECTURES / name / "config.json").read_text())
    for name in (
        "llama-3.1-8b",
        "qwen2.5-72b",
        "qwen3-8b",
        "qwen3-30b-a3b",
        "mixtral-8x7b",
        "mistral-small-24b",
        "seed-oss-36b",
        "glm-4.5-air",
        "olmo-3-7b",
        "qwen3.5-27b",
        "qwen3.5-35b-a3b",
    )
}
"""One of each family; the last two are vision models, whose language model has settings of its own."""


def refusal(directory: Path, tree: dict) -> str:
    (directory / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError) as refused:
        read_architecture(directory)
    return str(refused.value).removeprefix(str(directory))


def changed(tree: dict, **settings) -> dict:
    """`tree` with other settings of its language model."""
    return tree | {"text_config": tree["text_config"] | settings} if "text_config" in tree else tree | settings


SERVED_OTHERWISE = {
    "final_logit_softcapping": 30.0,
    "rope_is_neox_style": False,
    "bias": True,
    "dual_chunk_attention_config": {"chunk_size": 262144},
    "original_num_attention_heads": 8,
    "attention_chunk_size": 8192,
    "compression_config": {"quant_method": "compressed-tensors"},
    "num_kv_heads": 2,
    "v_head_dim": 64,
    "loop_num": 2,
}


@pytest.mark.parametrize("setting", SERVED_OTHERWISE)
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_sglang_computes_and_transformers_does_not_is_refused(tmp_path, name, setting):
    value = SERVED_OTHERWISE[setting]
    expected = f"/config.json has {setting} {value!r}, which SGLang reads and transformers ignores"
    assert refusal(tmp_path, changed(PUBLISHED[name], **{setting: value})).startswith(expected)
    if "text_config" in PUBLISHED[name]:
        assert refusal(tmp_path, PUBLISHED[name] | {setting: value}).startswith(expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_reads_in_every_model_is_refused(tmp_path, name):
    for setting, value in {
        "is_causal": False,
        "per_layer_config": {"0": {"rms_norm_eps": 0.1}},
        "transformers_weights": "other.safetensors",
        "num_kv_shared_layers": 1,
    }.items():
        expected = f"/config.json has {setting} {value!r}, which transformers reads in every model"
        assert refusal(tmp_path, changed(PUBLISHED[name], **{setting: value})).startswith(expected)
        assert refusal(tmp_path, PUBLISHED[name] | {setting: value}).startswith(expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_values_without_effect_of_what_sglang_reads_are_accepted(tmp_path, name):
    without = {
        "is_causal": True,
        "per_layer_config": None,
        "final_logit_softcapping": None,
        "rope_is_neox_style": True,
        "bias": False,
        "loop_num": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(changed(PUBLISHED[name], **without)))
    assert read_architecture(tmp_path) == read_architecture(ARCHITECTURES / name)


@pytest.mark.parametrize("part", ["text_config", "llm_config", "decoder"])
def test_a_language_model_that_is_a_part_of_another_model_is_refused(tmp_path, part):
    """SGLang would take heads and layers from there, transformers from the file itself."""
    tree = PUBLISHED["llama-3.1-8b"]
    assert f"/config.json has {part}, which is for models with other parts" in refusal(tmp_path, tree | {part: tree})


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "glm-4.5-air"])
def test_tied_embeddings_are_refused_where_sglang_makes_an_output_layer_of_its_own(tmp_path, name):
    said = refusal(tmp_path, PUBLISHED[name] | {"tie_word_embeddings": True})
    assert said.startswith("/config.json has tie_word_embeddings, which SGLang does not know of this model")


def test_a_head_size_that_sglang_does_not_read_is_refused(tmp_path):
    mixtral = PUBLISHED["mixtral-8x7b"]
    assert "has head_dim 64, which SGLang does not read" in refusal(tmp_path, mixtral | {"head_dim": 64})
    (tmp_path / "config.json").write_text(json.dumps(mixtral | {"head_dim": 128}))
    assert read_architecture(tmp_path).head_dim == 128


@pytest.mark.parametrize("name", ["qwen3.5-27b", "qwen3.5-35b-a3b"])
def test_states_of_gated_delta_nets_in_bf16_are_refused(tmp_path, name):
    said = refusal(tmp_path, changed(PUBLISHED[name], mamba_ssm_dtype="bfloat16"))
    assert "has mamba_ssm_dtype 'bfloat16', where transformers keeps states in float32" in said


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_model_type_than_the_architecture_s_is_refused(tmp_path, name):
    """transformers goes by the one, SGLang by the other: a Llama of model_type mistral has a window in one of them."""
    own = PUBLISHED[name].get("text_config", PUBLISHED[name])["model_type"]
    other = "mistral" if own != "mistral" else "llama"
    expected = f"/config.json has model_type {other} beside the architecture {PUBLISHED[name]['architectures'][0]}"
    assert refusal(tmp_path, changed(PUBLISHED[name], model_type=other)).startswith(expected)
    assert refusal(tmp_path, PUBLISHED[name] | {"model_type": other}).startswith(expected)


@pytest.mark.parametrize("name", ["qwen3.5-27b", "qwen3.5-35b-a3b"])
def test_a_vision_model_whose_weights_are_quantized_is_refused(tmp_path, name):
    said = refusal(tmp_path, PUBLISHED[name] | {"quantization_config": {"quant_method": "fp8"}})
    assert said.startswith("/config.json has quantization_config")


@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if name not in ("olmo-3-7b", "qwen3.5-27b", "qwen3.5-35b-a3b")]
)
def test_layers_with_windows_or_of_another_number_are_refused(tmp_path, name):
    layers = PUBLISHED[name]["num_hidden_layers"]
    for types in (["sliding_attention"] * layers, ["full_attention"] * (layers - 1), ["chunked_attention"] * layers):
        assert "has layer_types" in refusal(tmp_path, PUBLISHED[name] | {"layer_types": types})
    tree = PUBLISHED[name] | {"layer_types": ["full_attention"] * layers}
    if name == "mistral-small-24b":
        # transformers makes a Ministral of it.
        assert "has layer_types, with which transformers makes another model" in refusal(tmp_path, tree)
    else:
        (tmp_path / "config.json").write_text(json.dumps(tree))
        assert read_architecture(tmp_path) == read_architecture(ARCHITECTURES / name)


WRONG_TYPES = {
    "rms_norm_eps": ("1e-5", None, True),
    "hidden_size": ("4096", 4096.0, 0, -1, None),
    "num_hidden_layers": (2.0, True, 0),
    "num_attention_heads": ("32", 0),
    "head_dim": (0, -1, "128", 128.0),
    "num_key_value_heads": (0, "8"),
    "vocab_size": ("1000", None),
    "tie_word_embeddings": (None, "false", 0),
    "attention_bias": (None, "false", 1),
    "mlp_bias": ("false",),
    "use_sliding_window": ("false",),
}


@pytest.mark.parametrize("setting", WRONG_TYPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_setting_of_another_type_is_refused_by_name_and_value(tmp_path, name, setting):
    for value in WRONG_TYPES[setting]:
        tree = changed(PUBLISHED[name], **{setting: value})
        if setting == "tie_word_embeddings" and "text_config" in tree:
            tree[setting] = value
        assert refusal(tmp_path, tree).startswith(f"/config.json has {setting} {value!r}, which is n"), value


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("glm-4.5-air", {"first_k_dense_replace": None}),
        ("glm-4.5-air", {"num_nextn_predict_layers": None}),
        ("glm-4.5-air", {"routed_scaling_factor": "2.5"}),
        ("glm-4.5-air", {"routed_scaling_factor": None}),
        ("glm-4.5-air", {"norm_topk_prob": None}),
        ("glm-4.5-air", {"use_qk_norm": "false"}),
        ("glm-4.5-air", {"num_experts_per_tok": 129}),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 0}),
        ("qwen3-30b-a3b", {"norm_topk_prob": "true"}),
        ("qwen3-30b-a3b", {"num_experts": 64, "num_local_experts": 128}),
        ("glm-4.5-air", {"num_local_experts": 64}),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}),
        ("qwen3.5-35b-a3b", {"num_experts_per_tok": 257}),
        ("qwen3.5-27b", {"linear_conv_kernel_dim": 0}),
    ],
    ids=str,
)
def test_settings_of_experts_and_delta_nets_that_make_no_sense_are_refused_by_name(tmp_path, name, settings):
    (setting, value), *_ = settings.items()
    assert f"has {setting} {value!r}" in refusal(tmp_path, changed(PUBLISHED[name], **settings))


def test_a_qwen3_without_head_dim_has_the_heads_that_transformers_gives_it(tmp_path):
    """Of 128 dimensions, whatever hidden size and number of heads are."""
    tree = {key: value for key, value in PUBLISHED["qwen3-8b"].items() if key != "head_dim"}
    (tmp_path / "config.json").write_text(json.dumps(tree | {"hidden_size": 1024}))
    assert read_architecture(tmp_path).head_dim == 128
