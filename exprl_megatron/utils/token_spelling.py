"""The bytes that the tokens of byte-level tokenizers stand for."""

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_spellings: weakref.WeakKeyDictionary[Any, "Spelling | None"] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Spelling:
    """The bytes that a byte-level tokenizer's tokens stand for."""

    tokens: tuple[bytes, ...]
    """The bytes of every token, none for special ones."""
    data: np.ndarray
    """[bytes], uint8: those of all tokens, one token behind the other."""
    ends: np.ndarray
    """[1 + tokens], int64: where the bytes of the first 0, 1, ... tokens end."""

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> "Spelling":
        """Build the table from the bytes of every token."""
        ends = _ends(np.array([len(token) for token in tokens], np.int64))
        return cls(tuple(tokens), np.frombuffer(b"".join(tokens), np.uint8), ends)

    def spelled(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Return the bytes of `ids` [n] (int64), and where those of the first 0, 1, ... of them end (int64, [1
        + n]).
        """
        starts = self.ends[ids]
        lengths = self.ends[ids + 1] - starts
        ends = _ends(lengths)
        places = np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])
        return self.data[places].tobytes(), ends


def spelling_of(tokenizer: "PreTrainedTokenizerBase") -> Spelling | None:
    """Return None where the tokenizer does not spell in bytes; built once for each tokenizer."""
    if tokenizer not in _spellings:
        _spellings[tokenizer] = _byte_spelling(tokenizer)
    return _spellings[tokenizer]


def decoded(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Decode `ids`, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the tokens that give no text."""
    added = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return added | set(tokenizer.all_special_ids)


def _byte_spelling(tokenizer: "PreTrainedTokenizerBase") -> Spelling | None:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None or json.loads(decoder.__getstate__())["type"] != "ByteLevel":
        return None
    special = special_ids(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    spelling = tuple(b"" if token in special or name is None else _bytes_of(name) for token, name in enumerate(names))
    # As the decoder itself spells all of them, or not at all.
    every = b"".join(spelling).decode("utf-8", "replace")
    if every != decoded(list(range(len(spelling))), tokenizer):
        return None
    return Spelling.of(spelling)


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


def _bytes_of(name: str) -> bytes:
    """Return a token's bytes; a name with a character that represents no byte is written in UTF-8, as the
    decoder does.
    """
    if all(character in _BYTES for character in name):
        return bytes(_BYTES[character] for character in name)
    return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the characters that byte-level tokenizers (GPT-2's and after) write for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in shown)
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()
