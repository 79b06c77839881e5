"""SGLang's own qwen3_5: language models alone, and those of vision models, dense and mixtures of experts."""

from sglang.srt.models import qwen3_5, qwen3_5_text

EntryClass = [*qwen3_5_text.EntryClass, *qwen3_5.EntryClass]
