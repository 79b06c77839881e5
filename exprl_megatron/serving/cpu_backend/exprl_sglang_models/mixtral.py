"""SGLang's own mixtral."""

from sglang.srt.models.mixtral import EntryClass as EntryClass
