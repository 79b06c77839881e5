"""The supported architecture that an unknown one is most like, by settings of transformers' config classes."""

import json

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import FAMILIES, read_architecture
from exprl_megatron.models.nearest import DELTA_NETS, EXPERTS, FEATURES, QK_NORM, WINDOWS, features, nearest


def settings(kind: str) -> dict:
    """config.json as transformers writes it for a model of its defaults."""
    return json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))


DENSE, QWEN3_5 = "LlamaForCausalLM", "Qwen3_5ForCausalLM"
PLAIN_MIXTURE, GLM, OLMO = "MixtralForCausalLM", "Glm4MoeForCausalLM", "Olmo3ForCausalLM"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Dense layers as Llama's, whatever the name.
        ("smollm3", DENSE),
        ("phi3", DENSE),
        ("granite", DENSE),
        ("ernie4_5", DENSE),
        ("hunyuan_v1_dense", DENSE),
        ("gemma", DENSE),
        # Windows in some of the layers.
        ("gemma3_text", OLMO),
        ("gemma2", OLMO),
        ("exaone4", OLMO),
        ("cohere2", OLMO),
        # A shared expert, behind dense layers or with a sigmoid router.
        ("deepseek_v3", GLM),
        ("deepseek_v2", GLM),
        ("glm4_moe_lite", GLM),
        ("ernie4_5_moe", GLM),
        # Experts alone.
        ("gpt_oss", PLAIN_MIXTURE),
        ("minimax", PLAIN_MIXTURE),
        ("granitemoe", PLAIN_MIXTURE),
        ("phimoe", PLAIN_MIXTURE),
        ("qwen2_moe", "Qwen3MoeForCausalLM"),
        # Gated delta nets.
        ("qwen3_next", "Qwen3_5MoeForCausalLM"),
        # The name, where nothing else is another's.
        ("ministral3", "MistralForCausalLM"),
        ("olmo2", OLMO),
        ("glm4", "Qwen2ForCausalLM"),
    ],
)
def test_the_nearest_architecture_is_built_alike(kind, expected):
    assert nearest(CAUSAL[kind], settings(kind)) == expected


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        # Remote code, by the published config.json.
        ("InternLM3ForCausalLM", {"bias": False, "qkv_bias": False, "rope_scaling": None}, DENSE),
        ("InternLM2ForCausalLM", {"bias": False, "attn_implementation": "eager"}, DENSE),
        ("MiniMaxM2ForCausalLM", {"num_local_experts": 256, "scoring_func": "sigmoid", "use_qk_norm": True,
                                  "use_routing_bias": True, "shared_intermediate_size": 0}, "Qwen3MoeForCausalLM"),
        # The decoder's settings are in a section of their own.
        ("Mistral3ForConditionalGeneration", {"text_config": {"sliding_window": None}}, "MistralForCausalLM"),
        ("Gemma3ForConditionalGeneration", {"text_config": {"layer_types": ["sliding_attention"]}}, OLMO),
        ("Gemma3ForConditionalGeneration", {"text_config": None}, DENSE),
        ("Llama4ForConditionalGeneration", {"text_config": {"num_local_experts": 16}}, PLAIN_MIXTURE),
        ("Qwen3_6ForConditionalGeneration", {"text_config": {"linear_num_value_heads": 32}},
         "Qwen3_5ForConditionalGeneration"),
        ("Qwen3VLForConditionalGeneration", {"text_config": {"attention_bias": False}}, "Qwen3ForCausalLM"),
        ("LlamaBidirectionalModel", {}, DENSE),
    ],
)  # fmt: skip
def test_settings_count_wherever_they_are(name, more, expected):
    assert nearest(name, more) == expected


def test_an_unknown_architecture_is_refused_with_the_nearest_one_and_the_page_of_models(tmp_path):
    tree = settings("gemma3_text") | {"architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    said = f"Gemma3ForCausalLM, which is not supported; the nearest supported one is {OLMO}, and docs/models.md"
    with pytest.raises(UserError, match=said):
        read_architecture(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_supported_architecture_is_nearest_to_itself(name):
    assert nearest(name, {}) == name or FEATURES[name]
    kinds = {architecture: kind for kind, architecture in CAUSAL.items()}
    if (kind := kinds.get(name)) is not None:
        found = features(settings(kind))
        # transformers' defaults have no biases, and no setting for norms of queries and keys.
        assert found & {DELTA_NETS, EXPERTS, WINDOWS} == FEATURES[name] & {DELTA_NETS, EXPERTS, WINDOWS}
        assert found - {QK_NORM} <= FEATURES[name]
        assert nearest(name, settings(kind)) == name
