"""The one place that loads a model's tokenizer; transformers is imported at the first call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exprl_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the model's directory; code in the directory is never executed.

    Raises:
        UserError: the directory has no tokenizer, or one that transformers cannot read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers and tokenizers raise many kinds for a missing or damaged file
        if Path(model).is_dir() and not (Path(model) / "tokenizer.json").is_file():
            raise UserError(_missing(model)) from error
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(" .:")
        raise UserError(
            f"The tokenizer in {model} cannot be read ({type(error).__name__}: {reason}); replace its files, "
            "tokenizer.json and tokenizer_config.json, by those of the model's publisher."
        ) from error
    # Without files transformers makes a tokenizer of the model's class, which knows no text.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(_missing(model))
    return tokenizer


def _missing(model: str | Path) -> str:
    return (
        f"There is no tokenizer in {model}: it has no tokenizer.json; copy tokenizer.json, tokenizer_config.json and "
        "chat_template.jinja from the model's publisher into it."
    )
