"""The one place that loads a model's tokenizer; transformers is imported at the first call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the model's directory; code in the directory is never executed."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
