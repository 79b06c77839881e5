"""Qwen3.5 and 3.6: the settings of their config.json that other families do not have, as transformers 5 reads them."""

from typing import Any

from exprl_megatron.errors import UserError
from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.models.layer_types import FULL, LINEAR

VISION_MODELS = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
MIXTURES = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
NAMES = ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", *VISION_MODELS)
_INTERVAL = 4


def text_settings(tree: dict, path: str) -> dict:
    """Return the settings of the language model: a vision model has them under `text_config`; other trees are returned
    as is.

    Raises:
        UserError: the file, read from `path`, lacks them or contradicts itself.
    """
    if tree["architectures"][0] not in VISION_MODELS:
        return tree
    text = tree.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{path} lacks text_config; fetch the model again.")
    tied = tree.get("tie_word_embeddings", False)
    if text.get("tie_word_embeddings", tied) != tied:
        raise UserError(
            f"{path} has tie_word_embeddings {str(tied).lower()} and another value in text_config, which libraries "
            f"read differently; make both the same."
        )
    return text | {"architectures": tree["architectures"], "tie_word_embeddings": tied}


def layer_types(tree: dict) -> tuple[str, ...]:
    """Return for each layer whether it is a gated delta net or attention."""
    if tree.get("layer_types"):
        return tuple(tree["layer_types"])
    interval = tree.get("full_attention_interval", _INTERVAL)
    return tuple(LINEAR if (layer + 1) % interval else FULL for layer in range(tree["num_hidden_layers"]))


def delta_net(tree: dict) -> DeltaNet:
    """Sizes of the gated delta net layers."""
    return DeltaNet(
        key_heads=tree.get("linear_num_key_heads", 16),
        value_heads=tree.get("linear_num_value_heads", 32),
        key_dim=tree.get("linear_key_head_dim", 128),
        value_dim=tree.get("linear_value_head_dim", 128),
        kernel=tree.get("linear_conv_kernel_dim", 4),
    )


def served_settings(tree: dict, rope_base: float, rotary_share: float) -> dict[str, Any]:
    """Return the settings that SGLang 0.5.23 reads in place of config.json's own.

    It knows the kinds of layers by `full_attention_interval`, which transformers 5 does not write, and the share of a
    head that turns from beside the rotary settings, where published files do not have it; and it needs the latter.
    """
    types = layer_types(tree)
    base = {"rope_type": "default", "rope_theta": rope_base}
    sections = {name: value for name, value in (tree.get("rope_parameters") or {}).items() if name.startswith("mrope_")}
    return {
        "full_attention_interval": (types.index(FULL) if FULL in types else len(types)) + 1,
        "partial_rotary_factor": rotary_share,
        "rope_parameters": base | sections,
    }


def prefix(tree: dict) -> str:
    """Beginning of the names of the language model's tensors."""
    return "model.language_model." if tree["architectures"][0] in VISION_MODELS else "model."


def left_out(tree: dict) -> tuple[str, ...]:
    """Return the vision tower and the layers of multi-token prediction."""
    return ("model.visual.", "mtp.") if tree["architectures"][0] in VISION_MODELS else ("mtp.",)


def unsupported_setting(tree: dict) -> str | None:
    """Return the first setting, as a noun phrase, that this policy or SGLang computes otherwise than transformers."""
    interval = tree.get("full_attention_interval", _INTERVAL)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        return f"full_attention_interval {interval!r}"
    types = tree.get("layer_types")
    if types and list(types) != list(layer_types({**tree, "layer_types": None})):
        return f"layer_types that are not one layer of {FULL} after each {interval - 1} of {LINEAR}"
    if not tree.get("attn_output_gate", True):
        return "attn_output_gate false"
    if tree.get("output_gate_type") not in (None, "silu", "swish"):
        return f"output_gate_type {tree['output_gate_type']}"
    net = delta_net(tree)
    if net.value_heads % net.key_heads:
        return f"linear_num_value_heads {net.value_heads}, which linear_num_key_heads {net.key_heads} does not divide"
    if tree["architectures"][0] in MIXTURES:
        return _unsupported_of_mixtures(tree)
    return "experts" if tree.get("num_experts") else None


def _unsupported_of_mixtures(tree: dict) -> str | None:
    """Return what is unsupported in a router; transformers and SGLang always make its weights sum to 1."""
    if not tree.get("norm_topk_prob", True):
        return "norm_topk_prob false"
    if not tree.get("shared_expert_intermediate_size"):
        return "no shared expert"
    return None
