"""What a config.json asks for beside its rotary positions that this policy would not compute as transformers does."""


def unsupported(tree: dict) -> str | None:
    """The first such setting as a noun phrase; what is left out counts as transformers reads it."""
    if tree.get("hidden_act", "silu") != "silu":
        return f"hidden_act {tree['hidden_act']}"
    if tree.get("use_sliding_window"):
        return "use_sliding_window"
    if tree["architectures"][0] in ("MixtralForCausalLM", "MistralForCausalLM") and tree.get("sliding_window"):
        return f"sliding_window {tree['sliding_window']}"
    if tree["architectures"][0] == "MistralForCausalLM" and "sliding_window" not in tree:
        return "no sliding_window, which means a window of 4096 tokens"
    if tree.get("decoder_sparse_step", 1) != 1 or tree.get("mlp_only_layers"):
        return "dense layers between its layers of experts"
    normalised = tree["architectures"][0] == "MixtralForCausalLM" or tree.get("norm_topk_prob")
    if tree.get("num_experts_per_tok") == 1 and normalised:
        return "one expert for each token, whose weight is always 1"
    if tree.get("mlp_bias"):
        return "mlp_bias"
    if tree["architectures"][0] == "SeedOssForCausalLM":
        if not tree.get("attention_bias", True):
            return "attention_bias false"
        if tree.get("attention_out_bias"):
            return "attention_out_bias"
    elif tree["architectures"][0] != "Qwen2ForCausalLM" and tree.get("attention_bias"):
        return "attention_bias"
    if tree.get("quantization_config"):
        return "quantization_config"
    return None
