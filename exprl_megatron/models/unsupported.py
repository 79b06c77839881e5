"""Settings of a config.json, other than rotary ones, that this policy would not compute as transformers does."""

from exprl_megatron.models import qwen3_5
from exprl_megatron.models.olmo3 import unsupported_of_olmo3


def unsupported(tree: dict) -> str | None:
    """Return the first such setting as a noun phrase; what is left out counts as transformers reads it."""
    name = tree["architectures"][0]
    if tree.get("hidden_act", "silu") != "silu":
        return f"hidden_act {tree['hidden_act']}"
    if tree.get("use_sliding_window"):
        return "use_sliding_window"
    if name in ("MixtralForCausalLM", "MistralForCausalLM") and tree.get("sliding_window"):
        return f"sliding_window {tree['sliding_window']}"
    if name == "MistralForCausalLM" and "sliding_window" not in tree:
        return "no sliding_window, which means a window of 4096 tokens"
    if name == "Olmo3ForCausalLM" and (setting := unsupported_of_olmo3(tree)) is not None:
        return setting
    if name == "Glm4MoeForCausalLM" and (setting := _of_glm(tree)) is not None:
        return setting
    if name in qwen3_5.NAMES and (setting := qwen3_5.unsupported_setting(tree)) is not None:
        return setting
    if tree.get("decoder_sparse_step", 1) != 1 or tree.get("mlp_only_layers"):
        return "dense layers between its layers of experts"
    # transformers normalizes in Mixtral and Qwen3.5 always, and in GLM-4.5 unless the config says otherwise.
    always = name == "MixtralForCausalLM" or name in qwen3_5.MIXTURES
    normalized = always or tree.get("norm_topk_prob", name == "Glm4MoeForCausalLM")
    if tree.get("num_experts_per_tok") == 1 and normalized:
        return "one expert for each token, whose weight is always 1"
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
    return None


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
    if tree.get("tie_word_embeddings"):
        return "tie_word_embeddings, which SGLang does not know of this model"
    return None
