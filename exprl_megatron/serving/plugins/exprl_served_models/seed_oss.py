"""Seed-OSS, which SGLang would serve by transformers' own layers, slowly and with other names of parameters."""

from copy import copy

from sglang.srt.models.qwen2 import Qwen2ForCausalLM


class SeedOssForCausalLM(Qwen2ForCausalLM):
    """Qwen2's layers: biases on query, key and value alone, and heads whose size the config gives."""

    def __init__(self, config, *arguments, **settings):
        config = copy(config)
        # SGLang records it on a CPU, and Qwen2's layers then compute a head's size from it and the hidden size.
        vars(config).pop("original_num_attention_heads", None)
        super().__init__(config, *arguments, **settings)


EntryClass = SeedOssForCausalLM
