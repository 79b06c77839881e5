"""SGLang's own qwen3."""

from sglang.srt.models.qwen3 import EntryClass as EntryClass
