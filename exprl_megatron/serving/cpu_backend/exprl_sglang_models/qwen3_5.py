"""SGLang's own qwen3_5: language models alone, and those of vision models."""

from sglang.srt.models.qwen3_5 import Qwen3_5ForConditionalGeneration
from sglang.srt.models.qwen3_5_text import Qwen3_5ForCausalLM

EntryClass = [Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration]
