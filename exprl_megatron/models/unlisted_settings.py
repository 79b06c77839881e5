"""Settings that one library reads in the config.json of any model, although the family does not list them.

The policy or a server would compute another model than transformers, without an error: each of them is refused unless
it is without effect. The files are those of transformers 5.19 and SGLang 0.5.23.
"""

from exprl_megatron.models import qwen3_5

_TRANSFORMERS: dict[str, tuple] = {
    # masking_utils.py
    "is_causal": (True,),
    # configuration_utils.py
    "per_layer_config": (None, {}),
    # modeling_utils.py
    "transformers_weights": (None,),
    "fusion_config": (None, {}),
    # cache_utils.py
    "num_kv_shared_layers": (None, 0),
}
"""What transformers reads, and the values of each with which it computes what it computes without the setting."""
_SGLANG: dict[str, tuple] = {
    # layers/logits_processor.py
    "final_logit_softcapping": (None,),
    # models/llama.py
    "rope_is_neox_style": (True,),
    "bias": (None, False),
    # models/qwen2.py and others
    "dual_chunk_attention_config": (None,),
    "original_num_attention_heads": (),
    # model_executor/model_runner_components/load_model_utils.py
    "attention_chunk_size": (None,),
    # configs/model_config.py
    "compression_config": (None, {}),
    "is_hybrid_swa": (None, False),
    "multi_query_group_num": (None,),
    "n_head_kv": (None,),
    "num_attention_groups": (None,),
    "num_attention_heads_per_layer": (None, []),
    "num_kv_heads": (None,),
    "swa_head_dim": (None,),
    "swa_num_key_value_heads": (),
    "swa_v_head_dim": (None,),
    "v_head_dim": (None, 0),
    # model_executor/model_runner_components/layer_setup.py
    "loop_num": (None, 1),
    "num_loops": (None, 1),
}
"""What SGLang reads and transformers ignores, and the values without effect."""
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator")
"""Where both libraries look for the settings of a language model that is a part of another model."""
_STATES = ("mamba_ssm_dtype", "float32")
"""In which dtype SGLang keeps the states of gated delta nets, and the one in which transformers does."""
_SEPARATE_HEAD = {"MixtralForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"}
"""Architectures of which SGLang makes an output layer of its own, whatever tie_word_embeddings says."""


def unlisted_setting(tree: dict) -> str | None:
    """Return the first setting of the config.json `tree` that makes a library compute another model (a noun phrase)."""
    name = tree["architectures"][0]
    for setting, values in _TRANSFORMERS.items():
        if setting in tree and tree[setting] not in values:
            return f"{setting} {tree[setting]!r}, which transformers reads in every model"
    for setting, values in _SGLANG.items():
        if setting in tree and tree[setting] not in values:
            return f"{setting} {tree[setting]!r}, which SGLang reads and transformers ignores"
    if name not in qwen3_5.VISION_MODELS and (part := next((part for part in _PARTS if tree.get(part)), None)):
        return f"{part}, which is for models with other parts than the language model"
    states, dtype = _STATES
    if name in qwen3_5.NAMES and tree.get(states, dtype) != dtype:
        return f"{states} {tree[states]!r}, where transformers keeps states in {dtype}"
    if name == "MixtralForCausalLM" and _other_head_dim(tree):
        return f"head_dim {tree['head_dim']}, which SGLang does not read of this model"
    if name in _SEPARATE_HEAD and tree.get("tie_word_embeddings"):
        return "tie_word_embeddings, which SGLang does not know of this model"
    return None


def _other_head_dim(tree: dict) -> bool:
    """Return whether a head has another size than the hidden size divided by the number of heads."""
    heads, hidden, size = (tree.get(setting) for setting in ("num_attention_heads", "hidden_size", "head_dim"))
    return bool(heads and hidden and size and size != hidden // heads)
