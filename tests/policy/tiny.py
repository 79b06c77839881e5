"""Tiny random models in Hugging Face form, and what transformers says about them."""

import json
from pathlib import Path

import torch
import transformers

from exprl_megatron.policy.batch import Sequence

VOCABULARY = 101
"""Odd, so that every tensor-parallel size pads it."""

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def write_model(directory: Path, family: str, tied: bool, seed: int = 1, shards: bool = False) -> Path:
    """A 4-layer model with 4 heads in 2 KV groups; norms and biases off their usual values."""
    config_class, model_class = FAMILIES[family]
    rope = LLAMA3_ROPE if family == "llama" else {"rope_type": "default", "rope_theta": 10000.0}
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12 if family == "qwen3" else 8,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        max_position_embeddings=256,
    )
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(4.0)
            assert parameter.abs().sum() > 0, name
    model.save_pretrained(directory, max_shard_size="20KB" if shards else "5GB")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def sequences(count: int = 7, seed: int = 5, vocabulary: int = VOCABULARY) -> list[Sequence]:
    """Prompts of 2 to 9 and responses of 3 to 20 random tokens, with advantages."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    made = []
    for _ in range(count):
        prompt, response = ids(2, 9), ids(3, 20)
        advantages = tuple(torch.randn(len(response), generator=generator).tolist())
        made.append(Sequence(prompt, response, advantages=advantages))
    return made


def expected_log_probs(
    directory: Path, batch: list[Sequence], temperature: float = 1.0
) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probs and entropies of the response tokens by transformers, one sequence at a time, in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    log_probs, entropies = [], []
    for sequence in batch:
        tokens = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        with torch.no_grad():
            logits = model(tokens).logits[0].float() / temperature
        table = logits[len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
        log_probs.append(table.gather(1, torch.tensor(sequence.response_ids)[:, None])[:, 0].tolist())
        entropies.append((-(table.exp() * table).sum(-1)).tolist())
    return log_probs, entropies
