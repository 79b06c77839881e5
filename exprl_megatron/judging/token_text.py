"""Aligns sampled token ids with their decoded text: which token contains which character.

Nothing is tokenized again. Tokens of byte-level tokenizers have known bytes, so that the offsets are sums. For others
the text is decoded once in full and once more in overlapping chunks of some 64 tokens, so that the work is linear in
the length of the response. This works for every decoder whose output grows with its input, such as word-level
decoders that put spaces between words, and also for bytes that are not valid text.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from exprl_megatron.utils.token_spelling import Spelling, decoded, spelling_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STRETCH = 64
_UNDECODABLE = "\ufffd"


class TokenText:
    """A response's `text` without special tokens, and the offsets of its tokens.

    Args:
        token_ids: the sampled token ids [tokens].
        tokenizer: the Hugging Face tokenizer that decodes them.
    """

    def __init__(self, token_ids: Sequence[int] | np.ndarray, tokenizer: "PreTrainedTokenizerBase"):
        ids = np.asarray(token_ids, np.int64)
        spelling = spelling_of(tokenizer)
        places = None if spelling is None else _BytePlaces.of(ids, spelling)
        self._places = _StretchPlaces(ids.tolist(), tokenizer) if places is None else places
        self.text: str = self._places.text

    def characters_before(self, token: int) -> int:
        """Count the characters that the first `token` tokens complete."""
        return self._places.characters_before(token)

    def token_at(self, character: int) -> int:
        """Return the index of the token in which `character` begins.

        Where a token ends the character before and also has the first bytes of this one, it is the next token.
        """
        return 0 if character == 0 else self._places.token_at(character)


class _BytePlaces:
    """Token offsets in a response of a byte-level tokenizer whose bytes are valid UTF-8."""

    def __init__(self, text: str, data: bytes, ends: np.ndarray):
        """`ends`, int64 [tokens + 1]: the number of bytes of the first 0, 1, ... tokens."""
        self.text = text
        self._ends = ends
        # The byte at which each character begins; None where all are single bytes.
        self._starts = None
        if len(text) != len(data):
            self._starts = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)

    @classmethod
    def of(cls, ids: np.ndarray, spelling: Spelling) -> "_BytePlaces | None":
        """Build the offsets; None where a token is unknown, or the bytes are not valid UTF-8."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(spelling.ends) - 1:
            return None
        data, ends = spelling.spelled(ids)
        try:
            return cls(data.decode(), data, ends)
        except UnicodeDecodeError:
            return None

    def characters_before(self, token: int) -> int:
        end = int(self._ends[min(token, len(self._ends) - 1)])
        if self._starts is None:
            return end
        started = int(np.searchsorted(self._starts, end))
        # The last character that begins before `end` is complete where the next one, or the end of the text, is there.
        whole = end in (self._starts[started] if started < len(self._starts) else self._ends[-1], 0)
        return started if whole else started - 1

    def token_at(self, character: int) -> int:
        place = character if self._starts is None else int(self._starts[character])
        token = int(np.searchsorted(self._ends, place))
        return token if self.characters_before(token) == character else token - 1


class _StretchPlaces:
    """Token offsets in any response, by decoding."""

    def __init__(self, ids: list[int], tokenizer: "PreTrainedTokenizerBase"):
        self._ids = ids
        self._tokenizer = tokenizer
        self.text: str = self._decode(0, len(self._ids))
        # Tokens before each anchor, their characters, and the token from which the chunk after the anchor is decoded:
        # the first text of a decoded chunk can differ (for example, have no space before it).
        self._tokens, self._characters, self._contexts = [0], [0], [0]
        self._lay_anchors()

    def characters_before(self, token: int) -> int:
        if token >= len(self._ids):
            return len(self.text)
        anchor = bisect_right(self._tokens, token) - 1
        first = self._characters[anchor]
        added = self._stretch(self._contexts[anchor], self._tokens[anchor], token)
        pairs = zip(added, self.text[first : first + len(added)], strict=False)
        return first + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def token_at(self, character: int) -> int:
        anchor = bisect_left(self._characters, character) - 1
        low = self._tokens[anchor]
        high = self._tokens[anchor + 1] if anchor + 1 < len(self._tokens) else len(self._ids)
        after = low + bisect_left(range(low, high), character, key=self.characters_before)
        return after if self.characters_before(after) == character else after - 1

    def _lay_anchors(self) -> None:
        """Place anchors where a character ends, so that text decoded from there equals that of the whole response."""
        size = _STRETCH
        while (end := self._tokens[-1] + size) < len(self._ids):
            start, characters = self._tokens[-1], self._characters[-1]
            added = self._stretch(self._contexts[-1], start, end)
            if added.endswith(_UNDECODABLE) or not self.text.startswith(added, characters):
                size += size // 8
                continue
            self._tokens.append(end)
            self._characters.append(characters + len(added))
            self._contexts.append(start if added else self._contexts[-1])
            size = _STRETCH

    def _stretch(self, context: int, start: int, end: int) -> str:
        """Return the text that the tokens from `start` to `end` add to those from `context` to `start`."""
        return self._decode(context, end)[len(self._decode(context, start)) :]

    def _decode(self, start: int, end: int) -> str:
        return decoded(self._ids[start:end], self._tokenizer)
