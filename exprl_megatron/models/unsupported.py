"""Settings of a config.json, other than rotary ones, that this policy would not compute as transformers does."""

from exprl_megatron.models import qwen3_5
from exprl_megatron.models.layer_types import FULL
from exprl_megatron.models.olmo3 import unsupported_of_olmo3
from exprl_megatron.models.setting_types import wrongly_typed
from exprl_megatron.models.unlisted_settings import unlisted_setting

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "MistralForCausalLM": "mistral",
    "SeedOssForCausalLM": "seed_oss",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Olmo3ForCausalLM": "olmo3",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5ForConditionalGeneration": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe_text",
}
"""By which name transformers knows the settings of each architecture's language model."""


def unsupported(tree: dict) -> str | None:
    """Return the first such setting as a noun phrase; what is left out counts as transformers reads it."""
    name = tree["architectures"][0]
    if (setting := wrongly_typed(tree) or unlisted_setting(tree) or _windows(tree, name)) is not None:
        return setting
    if tree.get("hidden_act", "silu") != "silu":
        return f"hidden_act {tree['hidden_act']}"
    if name == "Olmo3ForCausalLM" and (setting := unsupported_of_olmo3(tree)) is not None:
        return setting
    if name == "Glm4MoeForCausalLM" and (setting := _of_glm(tree)) is not None:
        return setting
    if name in qwen3_5.NAMES and (setting := qwen3_5.unsupported_setting(tree)) is not None:
        return setting
    if tree.get("mlp_bias"):
        return "mlp_bias"
    if name == "SeedOssForCausalLM":
        if not tree.get("attention_bias", True):
            return "attention_bias false"
        if tree.get("attention_out_bias"):
            return "attention_out_bias"
    elif name not in ("Qwen2ForCausalLM", "Glm4MoeForCausalLM") and tree.get("attention_bias"):
        return "attention_bias"
    if tree.get("quantization_config"):
        return "quantization_config"
    return _experts(tree, name) or _other_model_type(tree, name)


def unsupported_beside_text(tree: dict) -> str | None:
    """Return the first setting of a vision model's own, beside its language model's, that is not supported."""
    kind, expected = tree.get("model_type"), _MODEL_TYPES[tree["architectures"][0]].removesuffix("_text")
    if kind not in (None, expected):
        return f"model_type {kind} beside the architecture {tree['architectures'][0]}"
    if tree.get("quantization_config"):
        return "quantization_config"
    return unlisted_setting(tree)


def _windows(tree: dict, name: str) -> str | None:
    """Return what gives layers a window, in families whose layers all have full attention here."""
    if tree.get("use_sliding_window"):
        return "use_sliding_window"
    if name in ("MixtralForCausalLM", "MistralForCausalLM") and tree.get("sliding_window"):
        return f"sliding_window {tree['sliding_window']}"
    if name == "MistralForCausalLM" and "sliding_window" not in tree:
        return "no sliding_window, which means a window of 4096 tokens"
    if name == "Olmo3ForCausalLM" or name in qwen3_5.NAMES:
        return None
    types = tree.get("layer_types")
    if types is not None and name == "MistralForCausalLM":
        return "layer_types, with which transformers makes another model of it, with windows"
    if types is not None and types != [FULL] * tree.get("num_hidden_layers", 0):
        return f"layer_types {types}, where each layer is expected to be {FULL}"
    return None


def _experts(tree: dict, name: str) -> str | None:
    """Return what is unsupported in where a model has experts, and in how many each token goes to."""
    if tree.get("decoder_sparse_step", 1) != 1 or tree.get("mlp_only_layers"):
        return "dense layers between its layers of experts"
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    numbers = {setting: tree[setting] for setting in names if setting in tree}
    if len(set(numbers.values())) > 1:
        return " and ".join(f"{setting} {number}" for setting, number in numbers.items())
    chosen, count = tree.get("num_experts_per_tok", 1), max(numbers.values(), default=1)
    if chosen > count:
        return f"num_experts_per_tok {chosen}, more than its {count} experts"
    # transformers normalizes in Mixtral and Qwen3.5 always, and in GLM-4.5 unless the config says otherwise.
    always = name == "MixtralForCausalLM" or name in qwen3_5.MIXTURES
    normalized = always or tree.get("norm_topk_prob", name == "Glm4MoeForCausalLM")
    if tree.get("num_experts_per_tok") == 1 and normalized:
        return "one expert for each token, whose weight is always 1"
    return None


def _other_model_type(tree: dict, name: str) -> str | None:
    """Return the name by which transformers would choose another class than SGLang does by the architecture's."""
    kind = tree.get("model_type")
    return None if kind in (None, _MODEL_TYPES[name]) else f"model_type {kind} beside the architecture {name}"


def _of_glm(tree: dict) -> str | None:
    """Return what is unsupported in GLM-4.5 and its successors: Megatron computes their router in one way alone."""
    if not tree.get("norm_topk_prob", True):
        return "norm_topk_prob false, where Megatron's sigmoid router always makes weights sum to 1"
    if tree.get("n_group", 1) != 1 or tree.get("topk_group", 1) != 1:
        return f"n_group {tree.get('n_group', 1)} and topk_group {tree.get('topk_group', 1)}"
    if tree.get("n_shared_experts", 1) != 1:
        return f"n_shared_experts {tree['n_shared_experts']}"
    if not 0 <= tree.get("first_k_dense_replace", 1) < tree.get("num_hidden_layers", 46):
        return f"first_k_dense_replace {tree.get('first_k_dense_replace', 1)}, which leaves no layer with experts"
    if not 0 < tree.get("routed_scaling_factor", 1.0) < float("inf"):
        return f"routed_scaling_factor {tree['routed_scaling_factor']}"
    return None
