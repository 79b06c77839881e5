"""Types of the settings in a config.json: what transformers refuses must not be read as something else."""

import math

_WHOLE = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "shared_expert_intermediate_size",
    "vocab_size",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
)
"""Sizes and numbers of parts, at least 1."""
_WHOLE_OR_NULL = ("head_dim", "num_key_value_heads")
"""The same, where null means the value that follows from other settings."""
_COUNTS = (
    "first_k_dense_replace",
    "n_shared_experts",
    "num_experts",
    "num_local_experts",
    "num_mtp_layers",
    "num_nextn_predict_layers",
)
"""Numbers of parts that a model may be without."""
_FLAGS = (
    "attention_bias",
    "attention_out_bias",
    "attn_output_gate",
    "mlp_bias",
    "norm_topk_prob",
    "tie_word_embeddings",
    "use_qk_norm",
    "use_sliding_window",
)
_NUMBERS = ("initializer_range", "rms_norm_eps", "routed_scaling_factor")


def wrongly_typed(tree: dict) -> str | None:
    """Return the first setting of the config.json `tree` that is not of its type, as a noun phrase; None: all are."""
    for names, is_right, expected in (
        (_WHOLE, lambda value: _is_whole(value, 1), "not a whole number of 1 or more"),
        (_WHOLE_OR_NULL, lambda value: value is None or _is_whole(value, 1), "not a whole number of 1 or more"),
        (_COUNTS, lambda value: _is_whole(value, 0), "not a whole number of 0 or more"),
        (_FLAGS, lambda value: isinstance(value, bool), "neither true nor false"),
        (_NUMBERS, _is_number, "not a number"),
    ):
        for name in names:
            if name in tree and not is_right(tree[name]):
                return f"{name} {tree[name]!r}, which is {expected}"
    return None


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
