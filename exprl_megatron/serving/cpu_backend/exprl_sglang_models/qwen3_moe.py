"""SGLang's own qwen3_moe."""

from sglang.srt.models.qwen3_moe import EntryClass as EntryClass
