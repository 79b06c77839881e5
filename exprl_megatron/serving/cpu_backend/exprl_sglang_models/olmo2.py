"""SGLang's own olmo2, which serves Olmo 3 too."""

from sglang.srt.models.olmo2 import EntryClass as EntryClass
