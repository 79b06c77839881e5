"""What a model is, read from its Hugging Face `config.json`; needs neither torch nor Megatron."""

import json
from dataclasses import dataclass
from pathlib import Path

from exprl_megatron.config.policy import Layout
from exprl_megatron.errors import UserError

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of long wavelengths (transformers calls it rope type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Architecture:
    """A dense decoder: RMSNorm before attention and before a SwiGLU MLP, rotary positions, grouped queries."""

    family: str
    """`llama`, `qwen2` or `qwen3`."""
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    qk_norm: bool
    qkv_bias: bool
    tied: bool
    """Whether the output layer is the input embedding."""
    max_positions: int
    initializer_range: float
    """Standard deviation of randomly initialised matrices."""


def read_architecture(directory: str | Path) -> Architecture:
    """The architecture that `directory`/config.json describes.

    Raises UserError where there is no such file, or it describes a model that is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json; give a model directory in Hugging Face form.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch the model again.") from error
    names = tree.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise UserError(f"{path} describes the architecture {names[0]}; use one of {', '.join(sorted(FAMILIES))}.")
    unsupported = _unsupported(tree)
    if unsupported:
        raise UserError(f"{path} has {unsupported}, which is not supported; choose another model.")
    try:
        return _architecture(FAMILIES[names[0]], tree)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; fetch the model again.") from error


def layout_violations(architecture: Architecture, layout: Layout) -> list[str]:
    """One sentence for each way in which `layout` cannot hold `architecture` (the vocabulary is padded to fit)."""
    found = []
    for what, count in (
        ("attention heads", architecture.heads),
        ("KV groups", architecture.kv_groups),
        ("MLP columns", architecture.ffn),
    ):
        if count % layout.tp:
            found.append(
                f"policy.layout.tp is {layout.tp}, which does not divide the model's {count} {what}; "
                f"use one of {_divisors(architecture)}."
            )
    stages = layout.pp * layout.vpp
    if architecture.layers % stages:
        found.append(
            f"policy.layout.pp x vpp is {stages}, which does not divide the model's {architecture.layers} layers; "
            f"change pp or vpp."
        )
    return found


def check_layout(architecture: Architecture, layout: Layout) -> None:
    """Raises UserError with every violation, one a line."""
    found = layout_violations(architecture, layout)
    if found:
        raise UserError("\n".join(found))


def _divisors(architecture: Architecture) -> str:
    """The tensor-parallel sizes that fit."""
    counts = (architecture.heads, architecture.kv_groups, architecture.ffn)
    return ", ".join(str(n) for n in range(1, architecture.kv_groups + 1) if not any(count % n for count in counts))


def _unsupported(tree: dict) -> str | None:
    if tree.get("hidden_act", "silu") != "silu":
        return f"hidden_act {tree['hidden_act']}"
    if tree.get("use_sliding_window"):
        return "use_sliding_window"
    if tree.get("mlp_bias"):
        return "mlp_bias"
    if tree["architectures"][0] != "Qwen2ForCausalLM" and tree.get("attention_bias"):
        return "attention_bias"
    if tree.get("quantization_config"):
        return "quantization_config"
    kind = _rope(tree).get("rope_type", _rope(tree).get("type", "default"))
    return None if kind in ("default", "llama3") else f"rope type {kind}"


def _rope(tree: dict) -> dict:
    """The rotary settings: transformers 5 writes `rope_parameters`, before it `rope_scaling` beside `rope_theta`."""
    return tree.get("rope_parameters") or tree.get("rope_scaling") or {}


def _architecture(family: str, tree: dict) -> Architecture:
    heads = tree["num_attention_heads"]
    rope = _rope(tree)
    scaling = None
    if rope.get("rope_type", rope.get("type")) == "llama3":
        scaling = RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=rope["original_max_position_embeddings"],
        )
    return Architecture(
        family=family,
        layers=tree["num_hidden_layers"],
        hidden=tree["hidden_size"],
        heads=heads,
        kv_groups=tree.get("num_key_value_heads") or heads,
        head_dim=tree.get("head_dim") or tree["hidden_size"] // heads,
        ffn=tree["intermediate_size"],
        vocabulary=tree["vocab_size"],
        norm_eps=tree["rms_norm_eps"],
        rope_base=rope.get("rope_theta") or tree.get("rope_theta", 10000.0),
        rope_scaling=scaling,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tied=tree.get("tie_word_embeddings", False),
        max_positions=tree.get("max_position_embeddings", 2048),
        initializer_range=tree.get("initializer_range", 0.02),
    )
