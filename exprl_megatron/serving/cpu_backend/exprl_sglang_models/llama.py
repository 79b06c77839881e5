"""SGLang's own llama."""

from sglang.srt.models.llama import EntryClass as EntryClass
