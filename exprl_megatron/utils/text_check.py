"""Checks that the text of a server's reply is that of its token ids.

What is compared are bytes: each token's own, one after the other, against the text. That costs some 10 ns a token,
decoding by the tokenizer itself 60 to 170.
"""

import re
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from exprl_megatron.utils.token_spelling import decoded, special_ids, spelling_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNDECODABLE = "\ufffd".encode()
_SPACE = b" "
_CHARACTER = 4
"""Bytes of the longest character."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_checks: weakref.WeakKeyDictionary[Any, "TextCheck | None"] = weakref.WeakKeyDictionary()


class TextCheck:
    """Compares texts with the ids of a model."""

    def __init__(self, tokens: Sequence[bytes]):
        """`tokens` has the bytes of every token, none for special ones."""
        self._tokens = pa.array(tokens, pa.large_binary())

    def check(self, token_ids: np.ndarray, text: str) -> None:
        """Check that `text` is that of `token_ids`, int [n].

        A server leaves out the stop token at the end, special tokens, and the space before some punctuation, and it may
        show an incomplete character at the end, or not; some decoders put spaces between tokens, and so spaces do not
        count. Ids that the tokenizer does not know, and ids whose bytes are no text before their end, are not compared:
        what is shown of those depends on the server.

        Raises:
            ValueError: it is not.
        """
        if not len(token_ids):
            if text:
                raise ValueError("text is not empty, but there are no output_ids")
            return
        if token_ids.max() >= len(self._tokens):
            return
        own, given = self._spelled(token_ids), text.encode("utf-8", "surrogatepass")
        if own == given:
            return
        last = self._tokens[int(token_ids[-1])].as_py()
        own, last, given = (data.translate(None, _SPACE) for data in (own, last, _without_undecodable_end(given)))
        same = own.startswith(given) and _may_be_left_out(own[len(given) :], last)
        if not same and _is_text(own):
            raise ValueError(f"text is not that of the {len(token_ids)} output_ids")

    def _spelled(self, token_ids: np.ndarray) -> bytes:
        return self._tokens.take(pa.array(token_ids)).buffers()[2].to_pybytes()


def text_check_of(tokenizer: "PreTrainedTokenizerBase") -> TextCheck | None:
    """Return None where the tokenizer's texts are not its tokens put together; built once for each tokenizer."""
    if tokenizer not in _checks:
        tokens = _tokens_of(tokenizer)
        _checks[tokenizer] = None if tokens is None else TextCheck(tokens)
    return _checks[tokenizer]


def _tokens_of(tokenizer: "PreTrainedTokenizerBase") -> Sequence[bytes] | None:
    if (spelling := spelling_of(tokenizer)) is not None:
        return spelling.tokens
    # The tokens are words, or those of SentencePiece.
    special = special_ids(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens = [b"" if i in special or not name else name.replace("\u2581", " ").encode() for i, name in enumerate(names)]
    single = {i: byte[1] for i, name in enumerate(names) if name and (byte := _BYTE.fullmatch(name))}
    if not _falls_back_to_bytes(tokenizer):
        single = {}
    others = [i for i in range(len(names)) if i not in single]
    if _spaceless(b"".join(tokens[i] for i in others).decode()) != _spaceless(decoded(others, tokenizer)):
        return None
    return [bytes.fromhex(single[i]) if i in single else token for i, token in enumerate(tokens)]


def _falls_back_to_bytes(tokenizer: "PreTrainedTokenizerBase") -> bool:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return decoder is not None and b'"ByteFallback"' in decoder.__getstate__()


def _spaceless(text: str) -> str:
    return text.replace(" ", "")


def _may_be_left_out(end: bytes, last: bytes) -> bool:
    """Return whether what a text lacks at its end is no more than an incomplete character and the last token."""
    end = end.removesuffix(last)
    return not end or (len(end) < _CHARACTER and not _is_text(end, complete=True))


def _without_undecodable_end(data: bytes) -> bytes:
    while data.endswith(_UNDECODABLE):
        data = data.removesuffix(_UNDECODABLE)
    return data


def _is_text(data: bytes, complete: bool = False) -> bool:
    """Return whether `data` is UTF-8; unless it is to be `complete`, its last character need not be."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return not complete and error.reason == "unexpected end of data"
    return True
