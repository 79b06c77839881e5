"""Tiny random models in Hugging Face form, each with a tokenizer of its own, made from nothing."""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
)

Architecture = Literal[
    "llama",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "mixtral",
    "mistral",
    "seed-oss",
    "glm4-moe",
    "olmo3",
    "qwen3.5",
    "qwen3.5-moe",
]
CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3-moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
    "mistral": MistralConfig,
    "seed-oss": SeedOssConfig,
    "glm4-moe": Glm4MoeConfig,
    "olmo3": Olmo3Config,
    "qwen3.5": Qwen3_5TextConfig,
    "qwen3.5-moe": Qwen3_5MoeTextConfig,
}
_DELTA_NETS = {
    "head_dim": 32,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
OWN_SETTINGS = {
    "mistral": {"sliding_window": None},
    # Heads of a size of their own: all of them are wider than the hidden size.
    "seed-oss": {"head_dim": 24},
    "qwen3-moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3.5": _DELTA_NETS,
    "qwen3.5-moe": _DELTA_NETS
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "glm4-moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "attention_bias": True,
    },
}
OLMO3_WINDOW = 8
OLMO3_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "attention_factor": 0.1 * math.log(8.0) + 1.0,
}
"""Of tiny models: many sequences are longer than both."""
QWEN3_5 = ("qwen3.5", "qwen3.5-moe")
SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = (
    "What is 12 plus 34? The answer is 46. Score: 3. First take the number, then add seven; multiply the result by "
    "five and subtract what was there before. Problem, reference, trace and solution are judged step by step."
)


def write_tiny_model(
    directory: Path,
    architecture: Architecture,
    *,
    vocab_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    tied: bool = False,
    seed: int = 0,
    published_form: bool = True,
    rope: dict | None = None,
    mtp: bool = False,
    **settings,
) -> Path:
    """Write config, float32 weights and tokenizer into `directory` and return it.

    Norm weights, biases and logits are far from trivial. Llama has Llama 3's rope scaling, Qwen2 and
    Seed-OSS a bias on query, key and value, Qwen3 norms on query and key; Qwen3-MoE and Mixtral have 4 experts, 2 to a
    token. `published_form` writes settings under the names that published checkpoints have (rope_theta,
    rope_scaling, num_experts). `rope` is the rotary settings in place of the architecture's, `settings` are further
    ones of transformers' config.
    """
    tokenizer = tiny_tokenizer(vocab_size)
    torch.manual_seed(seed)
    config = CONFIGS[architecture](
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        rope_parameters=_olmo3_rope(rope) if architecture == "olmo3" else _rope(architecture, rope),
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **{"head_dim": hidden // heads} | OWN_SETTINGS.get(architecture, {}) | _olmo3(architecture, layers) | settings,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        mean, deviation = (1.0, 0.3) if "norm" in name else (0.0, 0.5 if name.endswith("bias") else 0.15)
        if architecture in QWEN3_5 and "norm" in name and "linear_attn" not in name:
            # These norms multiply by 1 + their weight.
            mean = 0.0
        if "conv1d" in name:
            deviation = 0.5
        torch.nn.init.normal_(parameter.data, mean, deviation)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, 0.0, 0.3)
    model.save_pretrained(directory)
    if mtp:
        _add_prediction_layer(directory / "model.safetensors", layers)
    tokenizer.save_pretrained(directory)
    if architecture in QWEN3_5 and published_form:
        _write_interval(directory / "config.json")
    if published_form and architecture not in QWEN3_5:
        _write_published_form(directory / "config.json")
    return directory


def _add_prediction_layer(path: Path, layers: int) -> None:
    """Store a layer of multi-token prediction behind the others, as GLM-4.5's published checkpoints do."""
    weights = load_file(path)
    last, added = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    extra = {name.replace(last, added): t.clone() + 0.01 for name, t in weights.items() if name.startswith(last)}
    hidden = weights["model.norm.weight"]
    extra |= {f"{added}{name}.weight": hidden + 0.1 for name in ("enorm", "hnorm", "shared_head.norm")}
    extra[f"{added}eh_proj.weight"] = torch.randn(len(hidden), 2 * len(hidden))
    extra[f"{added}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    extra[f"{added}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights | extra, path, metadata={"format": "pt"})


def write_tiny_vision_model(directory: Path, text_model: Path) -> Path:
    """Write Qwen3.5 as it is published, with a vision tower and a layer of multi-token prediction.

    Its language model is the tiny `text_model`; a mixture's experts are in one tensor for each layer.
    """
    text = json.loads((text_model / "config.json").read_text())
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    mixture = "num_experts" in text or "num_local_experts" in text
    config = (Qwen3_5MoeConfig if mixture else Qwen3_5Config)(
        text_config=text,
        vision_config=vision | {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 16},
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    torch.manual_seed(1)
    model = (Qwen3_5MoeForConditionalGeneration if mixture else Qwen3_5ForConditionalGeneration)(config).float()
    weights = with_joined_experts(load_file(text_model / "model.safetensors"))
    named = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
    rest = model.load_state_dict(named, strict=False)
    assert not rest.unexpected_keys and all(name.startswith(("model.visual.", "lm_head")) for name in rest.missing_keys)
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    save_file(with_joined_experts(load_file(path)), path, metadata={"format": "pt"})
    extra = {f"mtp.layers.0.{name}.weight": torch.randn(8, 4) for name in ("mlp.up_proj", "input_layernorm")}
    save_file(load_file(path) | extra | {"mtp.norm.weight": torch.randn(4)}, path, metadata={"format": "pt"})
    tree = json.loads((directory / "config.json").read_text())
    tree["text_config"]["full_attention_interval"] = text["full_attention_interval"]
    (directory / "config.json").write_text(json.dumps(tree, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((text_model / name).read_bytes())
    return directory


def with_joined_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the experts of each layer in two tensors, as transformers holds them and published files have them."""
    joined = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for layer in sorted({name.split("experts.")[0] for name in weights.keys() - joined.keys()}):
        count = sum(name.startswith(f"{layer}experts.") and name.endswith("up_proj.weight") for name in weights)
        each = [
            {x: weights[f"{layer}experts.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")} for e in range(count)
        ]
        joined[f"{layer}experts.gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in each])
        joined[f"{layer}experts.down_proj"] = torch.stack([e["down"] for e in each])
    return joined


def _write_interval(path: Path) -> None:
    """Write what published files of Qwen3.5 say of their layers, which transformers 5 leaves out."""
    config = json.loads(path.read_text())
    config["full_attention_interval"] = config["layer_types"].index("full_attention") + 1
    path.write_text(json.dumps(config, indent=2))


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE over ASCII with exactly `vocab_size` tokens (103 to about 250) and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_text = "".join(chr(code) for code in range(32, 127)) + "\n"
    alphabet = sorted({c for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(ascii_text) for c in piece})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", extra_special_tokens=["<|start|>"]
    )
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == vocab_size
    return fast


def _olmo3(architecture: Architecture, layers: int) -> dict:
    """Return settings with windows in all layers but every second one."""
    if architecture != "olmo3":
        return {}
    kinds = ["sliding_attention", "full_attention"]
    return {"sliding_window": OLMO3_WINDOW, "layer_types": [kinds[index % 2] for index in range(layers)]}


def _olmo3_rope(rope: dict | None) -> dict:
    plain = {"rope_type": "default", "rope_theta": 500_000}
    return {"sliding_attention": plain, "full_attention": plain | (rope or OLMO3_YARN)}


def _rope(architecture: Architecture, rope: dict | None) -> dict:
    if rope:
        return {"rope_theta": 10_000.0} | rope
    if architecture in QWEN3_5:
        sections = {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
        return sections | {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    if architecture != "llama":
        return {"rope_type": "default", "rope_theta": 10_000.0}
    return {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def _write_published_form(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    rope = rope.get("full_attention", rope)
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    if "Qwen3MoeForCausalLM" in config["architectures"]:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2))
