"""Olmo 3: the settings of its config.json that other families do not have, and what is refused of them."""

from exprl_megatron.models.layer_types import FULL, SLIDING

BASE = 500_000
"""The only `rope_theta`: transformers 5.19 takes it for layers with windows whatever config.json says, SGLang what is
there."""


def layer_types(tree: dict) -> tuple[str, ...]:
    """Return the type of each layer; by default every fourth layer has full attention."""
    default = [FULL if index % 4 == 3 else SLIDING for index in range(tree["num_hidden_layers"])]
    return tuple(tree.get("layer_types") or default)


def window(tree: dict) -> int:
    """Return how many tokens, including itself, a token attends to in layers with windows."""
    return tree.get("sliding_window", 4096)


def unsupported_of_olmo3(tree: dict) -> str | None:
    """Return the first setting that the libraries would not compute alike, as a noun phrase."""
    heads, hidden = tree.get("num_attention_heads", 0), tree.get("hidden_size", 0)
    if tree.get("rope_parameters"):
        return (
            "rope_parameters, the form of transformers 5, with which SGLang does not start (write those of "
            "full_attention as rope_scaling, and rope_theta beside it, as published models have them)"
        )
    if tree.get("rope_theta") != BASE:
        given = f"rope_theta {tree['rope_theta']}" if "rope_theta" in tree else "no rope_theta"
        return f"{given} instead of {BASE}, which transformers takes for layers with windows in any case"
    scaling = tree.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else "default"
    if kind not in ("default", "yarn"):
        return f"rope type {kind}, where published models have yarn"
    if tree.get("head_dim") and heads and tree["head_dim"] * heads != hidden:
        return f"head_dim {tree['head_dim']}, which SGLang does not read"
    if heads and hidden % heads:
        return f"hidden_size {hidden}, which {heads} heads do not divide"
    if tree.get("tie_word_embeddings"):
        return "tie_word_embeddings, which no published model has"
    return _layers(tree)


def _layers(tree: dict) -> str | None:
    types, width = layer_types(tree), window(tree)
    if isinstance(width, bool) or not isinstance(width, int) or width < 2:
        return f"sliding_window {width}, which is not a window of two tokens or more"
    if len(types) != tree["num_hidden_layers"]:
        return f"{len(types)} layer_types for {tree['num_hidden_layers']} layers"
    if set(types) != {FULL, SLIDING}:
        return f"layer_types {', '.join(sorted(set(types)))}, where both {SLIDING} and {FULL} are expected"
    return None
