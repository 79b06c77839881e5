"""Proves that a tokenizer ends a pre-token between two characters, regardless of the text around them.

Where a pre-token always ends before the space after a word, each word has the same tokens in every text. The proof
needs components whose rules are known; for any other tokenizer there is no proof.

One alternative of a pattern makes a whole match. Where no alternative has a part that accepts a character `before` and,
at that position or later, a part that accepts `behind`, no match spans a cut between the two, and no attempt to match
reads across it: the only look-ahead that is allowed, `(?!\\S)`, treats white space as the end of the text. Where each
character `before` is also a match by itself, a match ends at every such cut, and the next one begins there. Of several
components that split in sequence, one that ends a pre-token there is enough.
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
    """Return whether every cut between a character of `before` and `behind` is safe in every text.

    Args:
        backend: the fast tokenizer.
        before: characters, one of which is before the cut.
        behind: the white-space character after the cut.
    """
    model = json.loads(backend.model.__getstate__())
    if model["type"] not in ("BPE", "WordPiece", "WordLevel", "Unigram") or model.get("dropout"):
        return False
    normalizers, splitters = (_components(part) for part in (backend.normalizer, backend.pre_tokenizer))
    if not {component["type"] for component in normalizers} <= _NORMALIZERS:
        return False
    if any(component["type"] == "ByteLevel" for component in splitters[:-1]):
        return False  # the components after it get other characters
    patterns = [_pattern(component) for component in splitters]
    known = [pattern for pattern in patterns if pattern is not None]
    return (
        len(known) == len(patterns)
        and all(_never_spans(pattern, before, behind) for pattern in known)
        and all(any(_matches_all(pattern, character) for pattern in known) for character in before)
        and all(_added_token_is_apart(backend, token, before, behind) for token in _added(backend))
    )


def _components(part: Any) -> list[dict]:
    """Return the normalizers or pre-tokenizers of `part`, in order."""
    return [] if part is None else list(_flat(json.loads(part.__getstate__())))


def _flat(part: dict) -> Iterator[dict]:
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part.get("pretokenizers") or part.get("normalizers") or ():
        yield from _flat(inner)


def _pattern(component: dict) -> str | None:
    """Return the pattern whose matches, and the text between them, become pre-tokens; None where it is not known.

    A component that makes no pre-tokens has an empty pattern.
    """
    match component:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _GPT_2 if use_regex else ""
        case {"type": "Digits"}:
            return r"\p{N}+"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            # The text between the matches is lost, so there must be none.
            return pattern if all(_matches_all(pattern, character) for character in PRINTABLE + " \n") else None
    return None


def _never_spans(pattern: str, before: str, behind: str) -> bool:
    """Return whether no match can contain a character of `before` followed by `behind`; False where that is not
    decidable.
    """
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
    """Return whether a quantifier adds no match that spans a cut; `accepts`: what the repeated part accepts."""
    if repeated == "atom":
        return sign == "?" or not all(accepts)
    # A quantifier after a quantifier makes it lazy or possessive. Of groups only optional ones are supported.
    return sign in "?+" if repeated == "repeat" else sign == "?" and repeated == "close"


def _matches_any(pattern: str, characters: str) -> bool:
    """Return whether one of `characters` matches, regardless of case."""
    left = Split(Regex(f"(?i:{pattern})"), "removed").pre_tokenize_str(characters)
    return [(characters, (0, len(characters)))] != left


def _matches_all(pattern: str, character: str) -> bool:
    return bool(pattern) and not Split(Regex(pattern), "removed").pre_tokenize_str(character)


def _added(backend: Tokenizer) -> list[Any]:
    return list(backend.get_added_tokens_decoder().values())


def _added_token_is_apart(backend: Tokenizer, token: Any, before: str, behind: str) -> bool:
    """Return whether an added token, which is matched before anything is split, never spans a cut."""
    contents = [token.content]
    if backend.normalizer is not None:
        contents.append(backend.normalizer.normalize_str(token.content))
    spans = any(one in before and two == behind for text in contents for one, two in pairwise(text))
    return not (spans or token.rstrip or (token.single_word and any(text.startswith(behind) for text in contents)))
