"""Whether a tokenizer provably ends a pre-token between two characters, whatever comes before and after them.

Where a pre-token always ends before the space behind a word, each word of a text has the same tokens in every text.
The proof needs components whose rules are known; any other tokenizer is not proven, and says nothing wrong.

Of a pattern, one alternative makes a whole match. Where no alternative has a part that accepts a character `before`
and, at that place again or later, a part that accepts `behind`, no match spans a cut between the two, and no attempt to
match reads across it: the only look-ahead that is allowed, `(?!\\S)`, treats white space as the end of the text. Where
each character `before` is also a match by itself, a match ends at every such cut, and the next one begins there. Of
several components that split one after the other, one that ends a pre-token there is enough.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import Split

PRINTABLE = "".join(map(chr, range(33, 127)))
LETTERS = "".join(filter(str.isalpha, PRINTABLE))

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of ByteLevel with `use_regex`."""
_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_TOKENS = re.compile(
    r"(?P<look>\(\?!\\S\))|(?P<open>\((?:\?i?:)?)|(?P<close>\))|(?P<or>\|)|(?P<repeat>[?*+]|\{[\d,]+\})"
    r"|(?P<atom>\[(?:\\.|[^\[\]\\])+\]|\\[pP]\{\^?\w+\}|\\[sSdDwWrnt]|\\[^\w]|[^\\\[\](){}|?*+.^$])"
)


def always_splits(backend: Tokenizer, before: str, behind: str) -> bool:
    """Whether a text's tokens up to any cut between a character of `before` and the character `behind`, which is white
    space, and those from the cut on, are the tokens of the whole.
    """
    model = json.loads(backend.model.__getstate__())
    if model["type"] not in ("BPE", "WordPiece", "WordLevel", "Unigram") or model.get("dropout"):
        return False
    normalizers, splitters = (_components(part) for part in (backend.normalizer, backend.pre_tokenizer))
    if not {component["type"] for component in normalizers} <= _NORMALIZERS:
        return False
    if any(component["type"] == "ByteLevel" for component in splitters[:-1]):
        return False  # what comes behind it is given other characters
    patterns = [_pattern(component) for component in splitters]
    known = [pattern for pattern in patterns if pattern is not None]
    return (
        len(known) == len(patterns)
        and all(_never_spans(pattern, before, behind) for pattern in known)
        and all(any(_matches_all(pattern, character) for pattern in known) for character in before)
        and all(_added_token_is_apart(backend, token, before, behind) for token in _added(backend))
    )


def _components(part: Any) -> list[dict]:
    """The normalizers or pre-tokenizers that `part` is made of, in order."""
    return [] if part is None else list(_flat(json.loads(part.__getstate__())))


def _flat(part: dict) -> Iterator[dict]:
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part.get("pretokenizers") or part.get("normalizers") or ():
        yield from _flat(inner)


def _pattern(component: dict) -> str | None:
    """The pattern whose matches a component makes pre-tokens, together with what is between them; None: not known.

    One that makes no pre-tokens has an empty pattern.
    """
    match component:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _GPT_2 if use_regex else ""
        case {"type": "Digits"}:
            return r"\p{N}+"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            # What is between the matches is lost, so that nothing may be.
            return pattern if all(_matches_all(pattern, character) for character in PRINTABLE + " \n") else None
    return None


def _never_spans(pattern: str, before: str, behind: str) -> bool:
    """Whether no match can hold a character of `before` and `behind` next to it; False where that cannot be seen."""
    depth, place, passed = 0, 0, False
    kind: str | None = "open"
    accepts = (False, False)
    while place < len(pattern):
        if (found := _TOKENS.match(pattern, place)) is None:
            return False
        previous, kind, place = kind, found.lastgroup, found.end()
        if kind == "repeat":
            if not _repeats_apart(previous, found[0], accepts):
                return False
        elif kind == "atom":
            accepts = _matches_any(found[0], before), _matches_any(found[0], behind)
            if passed and accepts[1]:
                return False
            passed |= accepts[0]
        elif kind == "or":
            passed &= depth > 0
        else:
            depth += (kind == "open") - (kind == "close")
    return depth == 0


def _repeats_apart(repeated: str | None, sign: str, accepts: tuple[bool, bool]) -> bool:
    """Whether a sign of repetition adds no match that spans a cut; `accepts`: what the part before it does."""
    if repeated == "atom":
        return sign == "?" or not all(accepts)
    # A sign behind a sign says how to search. Of groups only those that are optional are read.
    return sign in "?+" if repeated == "repeat" else sign == "?" and repeated == "close"


def _matches_any(pattern: str, characters: str) -> bool:
    """Whether some of `characters` matches, upper and lower case alike."""
    left = Split(Regex(f"(?i:{pattern})"), "removed").pre_tokenize_str(characters)
    return [(characters, (0, len(characters)))] != left


def _matches_all(pattern: str, character: str) -> bool:
    return bool(pattern) and not Split(Regex(pattern), "removed").pre_tokenize_str(character)


def _added(backend: Tokenizer) -> list[Any]:
    return list(backend.get_added_tokens_decoder().values())


def _added_token_is_apart(backend: Tokenizer, token: Any, before: str, behind: str) -> bool:
    """Whether an added token, which is found before anything is split, never reaches across a cut."""
    contents = [token.content]
    if backend.normalizer is not None:
        contents.append(backend.normalizer.normalize_str(token.content))
    spans = any(one in before and two == behind for text in contents for one, two in pairwise(text))
    return not (spans or token.rstrip or (token.single_word and any(text.startswith(behind) for text in contents)))
