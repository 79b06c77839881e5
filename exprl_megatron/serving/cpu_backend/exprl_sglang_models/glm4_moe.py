"""SGLang's own glm4_moe."""

from sglang.srt.models.glm4_moe import EntryClass as EntryClass
