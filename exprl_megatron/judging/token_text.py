"""Sampled token ids beside their decoded text: which token holds which character.

Nothing is tokenised again. The text is decoded once in full and once more in overlapping stretches of some 64
tokens, so that the work grows with the length of the response alone (a run of undecodable bytes makes one long
stretch). That holds for every decoder whose output grows with its input: byte-level BPE, where one character may be
spread over several tokens, and word-level decoders that put spaces between words.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

_STRETCH = 64
_UNDECODABLE = "\ufffd"


class TokenText:
    """A response's `text`, special tokens left out, and the places of its tokens in it."""

    def __init__(self, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase):
        self._ids = list(token_ids)
        self._tokenizer = tokenizer
        self.text: str = self._decode(0, len(self._ids))
        # Tokens before each anchor, characters that they give, and the token from where the stretch behind it is
        # decoded: what comes first in a decoded stretch can look different (no space before it, say).
        self._tokens, self._characters, self._contexts = [0], [0], [0]
        self._lay_anchors()

    def characters_before(self, token: int) -> int:
        """How many characters of the text the first `token` tokens give; one that they only begin is not counted."""
        if token >= len(self._ids):
            return len(self.text)
        anchor = bisect_right(self._tokens, token) - 1
        first = self._characters[anchor]
        added = self._stretch(self._contexts[anchor], self._tokens[anchor], token)
        pairs = zip(added, self.text[first : first + len(added)], strict=False)
        return first + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def token_at(self, character: int) -> int:
        """The token in which `character` begins.

        Where a token ends the character before and also holds the first bytes of this one, it is the next token.
        """
        if character == 0:
            return 0
        anchor = bisect_left(self._characters, character) - 1
        low = self._tokens[anchor]
        high = self._tokens[anchor + 1] if anchor + 1 < len(self._tokens) else len(self._ids)
        after = low + bisect_left(range(low, high), character, key=self.characters_before)
        return after if self.characters_before(after) == character else after - 1

    def _lay_anchors(self) -> None:
        """Anchors stand where a character ends, so that what is decoded from there on is the same as in the whole."""
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
        """What the tokens from `start` to `end` add to those from `context` to `start`."""
        return self._decode(context, end)[len(self._decode(context, start)) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
