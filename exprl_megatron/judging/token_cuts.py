"""Finds safe cuts of a text: the concatenated tokens of the two parts are the tokens of the whole text.

A tokenizer normalizes a text, splits it into pre-tokens, and tokenizes each of them independently. A cut is safe where
a pre-token ends regardless of the text around it (`word| word`, `word|\\n`), and where the part after it is normalized
and split as within the whole. Where a tokenizer has no pre-tokens, or whole lines as pre-tokens, merges of byte-pair
encoding on the two sides of a cut are independent as long as no token of the vocabulary spans it.

All of this is checked. The components of the tokenizer must be known to depend on nearby text only, and each kind of
cut is tested on some thousand texts before it is used. Cuts where a pre-token is proven to end in every text (see
token_splits) are called proven.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import product

from tokenizers import Tokenizer

from exprl_megatron.judging.token_splits import LETTERS, PRINTABLE, always_splits
from exprl_megatron.judging.word_tokens import SPACES

WORDS = re.compile(r"(?<=[a-z])(?= [a-z])")
"""Between two words of one line."""
LINES = re.compile(r"(?<=[^\W\d_])(?=\n)")
"""After a letter of any script at the end of a line."""
ASCII_LINES = re.compile(r"(?<=[A-Za-z])(?=\n)")
"""After an ASCII letter at the end of a line."""

_NEAR, _FAR = 256, 8192
_LEFT = (
    *(
        "a",
        "the",
        "\n\nso",
        "x = 3.5 and",
        "don't",
        "we'll",
        "I'd",
        "…it",
        "(so",
        "**so",
        "<b>so",
        "3rd",
        "x2y",
        "\tso",
    ),
    *("  so", "naïve", "東京so", "🙂so", "e\u0301te", "HTTPs", "$x", "\\frac", "a_b", "1,000 km", "####so", "\r\nso"),
    *("ab" * 20, " " * 20 + "so", "==" * 9 + "s"),
)
_LEFT_LINES = (*_LEFT, "ABC", "東京", "Größe", "Ωμέγα", "строка", "한국어", "क्ष", "x = Y")
_AFTER = (
    *(
        "s",
        "t",
        "so",
        "word",
        "re-do",
        "don't",
        "i.e.",
        "x2",
        "x^2 = 4",
        "x\n\ny",
        "a  b",
        "naïve",
        "a東京",
        "é",
        "b🙂",
    ),
    *("a\u0301", "a" * 40, "is 3.5", "is \\(x\\)", "n't", "ll", "d ", "m\t", "ve,", "a </trace>", "x = " + "=" * 20),
)
_AFTER_LINES = (
    *_AFTER,
    "\n",
    "\n### A",
    "  b",
    "### A",
    "- b",
    "1. b",
    "東京",
    "\tb",
    "</trace>",
    "",
    "\u0301",
    "\r\n",
)
_LOCAL_NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "ByteLevel"}
)
_LOCAL_SPLITTERS = frozenset(
    {"ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Metaspace", "BertPreTokenizer"}
)
# Matches what makes a pattern look back, at the ends of the text, or ahead by more than a character.
_LOOKS_AROUND = re.compile(r"\(\?(?!:|i:|!\\S\))|\\[bBAzZGK1-9]|\^|\$")
_CLASS = re.compile(r"\[(?:\\.|\[[^\]]*\]|[^\]\\])*\]")
_SPANS_WORDS = re.compile(r"[a-z][ ▁Ġ]+[a-z]")


class Cuts:
    """Finds safe cuts for one tokenizer; falsy where no kind of cut is known to be safe.

    Args:
        kinds: patterns whose empty matches are cuts.
        proven: those of the kinds, or subsets of them, that are proven to be safe in every text.
    """

    def __init__(self, kinds: Iterable[re.Pattern], proven: Iterable[re.Pattern] = ()):
        self._kinds = tuple(kinds)
        self.proven = tuple(proven)

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def last(self, text: str, start: int, end: int) -> int | None:
        """Return the last safe cut of text[start:end] after `start`, judged by that part alone, or None."""
        for size in (_NEAR, _FAR):
            low = max(start + 1, end - size)
            places = [match.start() for kind in self._kinds for match in kind.finditer(text, low, end)]
            if places or low == start + 1:
                return max(places, default=None)
        return None

    def is_proven(self, text: str, cut: int) -> bool:
        """Return whether this cut is proven to be safe."""
        return any(kind.match(text, cut) for kind in self.proven)

    def first(self, text: str, start: int) -> int | None:
        """Return the first safe cut of `text` after `start`, or None."""
        matches = (kind.search(text, start + 1) for kind in self._kinds)
        return min((match.start() for match in matches if match), default=None)


def safe_cuts(backend: Tokenizer) -> Cuts:
    """Determine the kinds of cuts that are safe for this tokenizer."""
    normalizer, splitter = (
        json.loads(part.__getstate__()) if part is not None else None
        for part in (backend.normalizer, backend.pre_tokenizer)
    )
    model = json.loads(backend.model.__getstate__())
    if not _normalizer_is_local(normalizer) or not _splitter_is_local(splitter) or model.get("dropout"):
        return Cuts(())
    merges_apart = model["type"] == "BPE" and not any(_SPANS_WORDS.search(token) for token in model["vocab"])
    words = _joins(backend, _LEFT, [f" {text}" for text in _AFTER], merges_apart and _never_splits_words(splitter))
    lines = _joins(backend, _LEFT_LINES, [f"\n{text}" for text in _AFTER_LINES], False)
    proven = []
    if words and lines:
        kinds = ((SPACES, PRINTABLE, " "), (ASCII_LINES, LETTERS, "\n"))
        proven = [kind for kind, before, behind in kinds if always_splits(backend, before, behind)]
    spaces = [SPACES] if SPACES in proven else [WORDS] * words
    return Cuts([*spaces, *[LINES] * lines], proven)


def _joins(backend: Tokenizer, left: Iterable[str], right: Iterable[str], within_words: bool) -> bool:
    """Return whether the tokens of each left text and each right text are those of both together.

    Unless `within_words`, a pre-token must end between them.
    """
    pairs = list(product(left, right))
    wholes = backend.encode_batch([a + b for a, b in pairs], add_special_tokens=False)
    parts = {
        text: encoding.ids
        for texts in (left, right)
        for text, encoding in zip(texts, backend.encode_batch_fast(list(texts), add_special_tokens=False), strict=True)
    }
    for (a, b), whole in zip(pairs, wholes, strict=True):
        if whole.ids != parts[a] + parts[b]:
            return False
        before, behind = (whole.char_to_word(place) for place in (len(a) - 1, len(a)))
        if not within_words and before is not None and before == behind:
            return False
    return True


def _normalizer_is_local(normalizer: dict | None) -> bool:
    """Return whether the normalizer does the same to the parts of `word| word` and `word|\n` as to the whole."""
    for component in _components(normalizer, "normalizers"):
        if component["type"] == "Replace":
            if len(component["pattern"].get("String", "")) != 1:
                return False
        elif component["type"] not in _LOCAL_NORMALIZERS:
            return False
    return True


def _splitter_is_local(splitter: dict | None) -> bool:
    """Return whether the splits depend on nearby text only."""
    for component in _components(splitter, "pretokenizers"):
        if component["type"] == "Split":
            pattern = component["pattern"]
            if "Regex" in pattern and _LOOKS_AROUND.search(_CLASS.sub("", pattern["Regex"])):
                return False
        elif component["type"] not in _LOCAL_SPLITTERS:
            return False
    return True


def _never_splits_words(splitter: dict | None) -> bool:
    """Return whether the splitter splits only at spaces, if at all, so that a cut does not change the splits
    after it.
    """
    return all(
        component["type"] in ("Metaspace", "WhitespaceSplit")
        or (component["type"] == "ByteLevel" and not component["use_regex"])
        or (component["type"] == "Split" and component["pattern"].get("String") == " ")
        for component in _components(splitter, "pretokenizers")
    )


def _components(part: dict | None, name: str) -> Iterator[dict]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[name]:
            yield from _components(inner, name)
    else:
        yield part
