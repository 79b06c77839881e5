"""Finds the supported architecture nearest to an unknown one, by the features in its config.json and by its name."""

from collections.abc import Callable
from difflib import SequenceMatcher

Settings = dict
"""A config.json, or the section of it that has the decoder's settings."""

DELTA_NETS, EXPERTS, SHARED, DENSE_FIRST = "gated delta nets", "experts", "a shared expert", "dense layers first"
SIGMOID, WINDOWS, QK_NORM = "sigmoid router", "windows in some layers", "norms of queries and keys"
QKV_BIAS, PARTIAL = "biases of queries, keys and values", "part of each head turns"

_WEIGHTS = {
    DELTA_NETS: 12,
    EXPERTS: 6,
    SHARED: 3,
    WINDOWS: 3,
    DENSE_FIRST: 1,
    SIGMOID: 1,
    QK_NORM: 1,
    QKV_BIAS: 1,
    PARTIAL: 1,
}
"""How far apart two models are of which one has the feature."""
_NAME, _LIKE = 6, 0.7
"""What a name that is the same counts for; one that is less alike than `_LIKE` counts for nothing."""

FEATURES: dict[str, frozenset[str]] = {
    "LlamaForCausalLM": frozenset(),
    "Qwen2ForCausalLM": frozenset({QKV_BIAS}),
    "Qwen3ForCausalLM": frozenset({QK_NORM}),
    "Qwen3MoeForCausalLM": frozenset({EXPERTS, QK_NORM}),
    "MixtralForCausalLM": frozenset({EXPERTS}),
    "MistralForCausalLM": frozenset(),
    "SeedOssForCausalLM": frozenset({QKV_BIAS}),
    "Glm4MoeForCausalLM": frozenset({EXPERTS, SHARED, DENSE_FIRST, SIGMOID, QKV_BIAS, PARTIAL}),
    "Olmo3ForCausalLM": frozenset({WINDOWS, QK_NORM}),
    "Qwen3_5ForCausalLM": frozenset({DELTA_NETS, PARTIAL, QK_NORM}),
    "Qwen3_5ForConditionalGeneration": frozenset({DELTA_NETS, PARTIAL, QK_NORM}),
    "Qwen3_5MoeForCausalLM": frozenset({DELTA_NETS, EXPERTS, SHARED, PARTIAL, QK_NORM}),
    "Qwen3_5MoeForConditionalGeneration": frozenset({DELTA_NETS, EXPERTS, SHARED, PARTIAL, QK_NORM}),
}
"""Of each supported architecture, in the order in which those that are equally near are preferred."""


def nearest(name: str, tree: Settings) -> str:
    """Return the supported architecture that is most like the unknown one called `name` with the config.json `tree`."""
    wanted = features(tree | (tree.get("text_config") or {}))

    def distance(known: str) -> float:
        differing = sum(_WEIGHTS[feature] for feature in wanted ^ FEATURES[known])
        # The suffix of the family's name, such as `ForConditionalGeneration`, only distinguishes the family's own
        # forms.
        family = SequenceMatcher(None, name.split("For")[0], known.split("For")[0]).ratio()
        form = SequenceMatcher(None, name, known).ratio()
        return differing - _NAME * (family if family >= _LIKE else 0) - 0.01 * form * (family >= _LIKE)

    return min(FEATURES, key=distance)


def features(settings: Settings) -> set[str]:
    """Return the FEATURES that `settings` ask for, by the names that published models and transformers use."""
    return {feature for feature, asked in _ASKED.items() if asked(settings)}


def _any_of(*names: str) -> Callable[[Settings], bool]:
    return lambda settings: any(settings.get(name) for name in names)


def _has_windows(settings: Settings) -> bool:
    types = set(settings.get("layer_types") or ())
    return "sliding_attention" in types or bool(settings.get("sliding_window_pattern"))


def _has_sigmoid_router(settings: Settings) -> bool:
    by_name = settings.get("scoring_func") == "sigmoid" or settings.get("topk_method") == "noaux_tc"
    return by_name or "routed_scaling_factor" in settings or bool(settings.get("use_routing_bias"))


def _turns_partly(settings: Settings) -> bool:
    rope = settings.get("rope_parameters") or {}
    return settings.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) not in (1.0, None)


_ASKED: dict[str, Callable[[Settings], bool]] = {
    DELTA_NETS: _any_of("linear_num_value_heads"),
    EXPERTS: _any_of("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    SHARED: _any_of(
        "n_shared_experts",
        "num_shared_experts",
        "moe_num_shared_experts",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    DENSE_FIRST: _any_of("first_k_dense_replace", "moe_layer_start_index"),
    SIGMOID: _has_sigmoid_router,
    WINDOWS: _has_windows,
    QK_NORM: _any_of("use_qk_norm", "qk_norm", "qk_layernorm"),
    QKV_BIAS: _any_of("attention_bias", "qkv_bias", "use_bias", "bias"),
    PARTIAL: _turns_partly,
}
