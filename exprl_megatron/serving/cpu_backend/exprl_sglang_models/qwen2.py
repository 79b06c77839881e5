"""SGLang's own qwen2."""

from sglang.srt.models.qwen2 import EntryClass as EntryClass
