"""Tokenizes texts by their words, for tokenizers that provably tokenize each word independently."""

import re
from collections.abc import Callable, Mapping, Sequence

import msgspec
from tokenizers import Tokenizer

from exprl_megatron.utils.token_ids import TokenPart

SPACES = re.compile(r"(?<=[!-~])(?= )")
"""The end of a word: between a printable ASCII character and a space."""
_SPACE = re.compile(r"(?<=[!-~]) ")
_LONGEST_KEPT = 64
_MOST_KEPT = 2**16


class WordTokens:
    """Caches the tokens of words; safe for use by several threads.

    It is only for tokenizers that always split at SPACES (see `always_splits`).

    Args:
        encode: returns the token ids of each text.
        separator: text and id of a token that the tokenizer finds before it splits a text. New words are joined by it
            and tokenized in one call, which costs less than one call for each.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[list[int]]], separator: tuple[str, int] | None = None):
        self._encode = encode
        self._separator = separator
        # It has the ids of ` word` in JSON, without brackets.
        self._known: dict[str, bytes] = {}

    def parts(self, texts: Sequence[str]) -> list[TokenPart]:
        """Return the token ids of each text."""
        known = self._known
        split = [_SPACE.split(text) for text in texts]
        rows = [list(map(known.get, words)) for words in split]
        for row in rows:
            row[0] = b""  # the first word has no space before it
        open_rows = [(words, row) for words, row in zip(split, rows, strict=True) if None in row]
        pairs = (pair for words, row in open_rows for pair in zip(words, row, strict=True))
        unknown = list(dict.fromkeys(word for word, ids in pairs if ids is None))
        encoded = self._encoded([*(words[0] for words in split), *(f" {word}" for word in unknown)])
        new = dict(zip(unknown, encoded[len(split) :], strict=True))
        for words, row in open_rows:
            row[:] = [new[word] if ids is None else ids for word, ids in zip(words, row, strict=True)]
        self._keep(new)
        for row, first in zip(rows, encoded, strict=False):
            row[0] = first
        return list(map(_joined, rows))

    def _encoded(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text in JSON, without brackets."""
        if self._separator is not None:
            content, token = self._separator
            plain = [text for text in texts if text and content not in text]
            ids = self._encode([content + content.join([*plain, ""])])[0]
            mark = f",{token},".encode()
            found = (b",%b," % _json(ids)).split(mark) if ids.count(token) == len(plain) + 1 else ()
            # Where a text has no tokens two separators share a comma, and there are too few parts.
            if len(found) == len(plain) + 2:
                others = iter(map(_json, self._encode([text for text in texts if content in text])))
                between = iter(found[1:-1])
                return [next(others) if content in text else next(between) if text else b"" for text in texts]
        return list(map(_json, self._encode(texts)))

    def _keep(self, new: Mapping[str, bytes]) -> None:
        if len(self._known) + len(new) > _MOST_KEPT:
            # Threads that look words up at this moment keep the old dict.
            self._known = {}
        self._known.update((word, ids) for word, ids in new.items() if len(word) <= _LONGEST_KEPT)


def separator_of(backend: Tokenizer) -> tuple[str, int] | None:
    """Return content and id of a token that WordTokens can use as its separator, or None."""
    if backend.encode_special_tokens:
        return None
    for token, added in sorted(backend.get_added_tokens_decoder().items()):
        takes_space = added.lstrip or added.rstrip or added.single_word
        if added.special and not (added.normalized or takes_space) and added.content.isascii():
            return added.content, token
    return None


def _json(ids: Sequence[int]) -> bytes:
    return msgspec.json.encode(ids)[1:-1]


def _joined(words: Sequence[bytes | None]) -> TokenPart:
    # A word may have no tokens where the vocabulary has none for its characters.
    ids = b",".join(filter(None, words))
    return TokenPart(ids, ids.count(b",") + 1 if ids else 0)
