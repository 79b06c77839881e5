"""Seed-OSS, which SGLang would serve by transformers' own layers, slowly and with other names of parameters."""

from sglang.srt.models.qwen2 import Qwen2ForCausalLM


class SeedOssForCausalLM(Qwen2ForCausalLM):
    """Qwen2's layers: biases on query, key and value alone, and heads whose size the config gives."""


EntryClass = SeedOssForCausalLM
