"""Reads a judge's verdict from its answer: a score of 1..5, or marks of a rubric's checkpoints and the soundness."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.judging.stated_scores import HIGHEST, LOWEST, StatedScore, stated_scores
from exprl_megatron.utils.thinking import mask_thinking

Parser = Literal["last", "released"]
Mark = Literal["established", "partial", "absent", "contradicted"]

_MARK = re.compile(
    r"(?<![a-z])mark[*_ \t]*#?(?P<checkpoint>\d+)[*_ \t]*:[\s*_\[(`\"'“‘]*"
    r"(?P<mark>established|partial|absent|contradicted)\b"
    # "Mark 1: absent or partial" is not a mark; "Mark 1: absent, Mark 2: partial" are two.
    r"(?![*_`\"'”’) \t]*(?:[/|,→]|[-=]>|(?:or|and|to)\b)[*_`\"'“‘( \t]*(?:established|partial|absent|contradicted)\b)",
    re.IGNORECASE | re.ASCII,
)
# "Sound: no errors", "Sound: yes/no" and "Sound: yes, but ..." are not verdicts.
_SOUND = re.compile(
    r"^[-*_#>•|` \t]*(?:\d+[.)][*_` \t]*)?sound(?:ness)?[*_ \t]*[:：][\s*_\[(`\"'“‘]*(?P<sound>yes|no)\b"
    r"[*_\])`\"'”’.✓✔✅✗✘❌ \t]*(?P<words>$|[-–—.:;,(<|\"'“‘«„「][^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_RESTRICTED = re.compile(
    r"[-–—.:;,(| \t]*(?:(?:but|except\w*|apart|aside|save|barring|although|though|however|unless|if|provided|or)\b"
    r"|no\b(?!(?:[ \t]+\w+){0,2}[ \t]+(?:errors?|mistakes?|flaws?|gaps?|issues?|problems?|false|invalid|wrong)\b)"
    r"|with\b[^\n]*\b(?:exceptions?|errors?|mistakes?|flaws?|gaps?|slips?|caveats?|reservations?)\b)",
    re.IGNORECASE,
)
_QUOTES = "\"'`“”‘’«»„「>"


@dataclass(frozen=True)
class Soundness:
    """Whether the judged text is valid throughout."""

    sound: bool
    words: str = ""
    """The first invalid words, as the judge quotes them; empty where it quotes none."""


def stated_score(text: str, parser: Parser = "last") -> StatedScore | None:
    """Find the score that an answer states.

    The parser `last` takes the last score outside of thinking blocks. A score directly after a quotation mark, or
    without a colon, counts only where there is no other. Where the last score is on a scale other than 5, there is
    none.

    The parser `released` reads as the released code does: the first character of the first line after the first
    `Score:` (or else the first `Score`), without asterisks.

    Returns:
        The score and its position; None where there is none.
    """
    return _last_stated(text) if parser == "last" else _released(text)


def parse_score(text: str, parser: Parser = "last") -> int | None:
    """Return the score that `text` states, where it is within 1..5 (4.5 becomes 4), else None."""
    return _score_within(stated_score(text, parser))


def read_verdict(text: str, parser: Parser = "last") -> Judgement:
    """Read an answer as a judgement: the score in [0, 1], or an abstention (`unreadable`, `out-of-range`)."""
    stated = stated_score(text, parser)
    score = _score_within(stated)
    if score is not None:
        return Scored(normalize(score), text)
    return Abstained("unreadable" if stated is None else "out-of-range", text)


def read_marks(text: str, checkpoints: int) -> tuple[Mark, ...] | None:
    """Read the marks of checkpoints 1, 2, ..., each from its last line `Mark N: ...`; None where one is missing.

    A mark directly after a quotation mark counts only where there is no other; thinking blocks are ignored.
    """
    found: dict[int, Mark] = {}
    text = mask_thinking(text)
    for match in sorted(_MARK.finditer(text), key=lambda match: not _quoted(text, match)):
        word = match["mark"].lower()
        found[int(match["checkpoint"])] = next(mark for mark in get_args(Mark) if mark == word)
    numbers = range(1, checkpoints + 1)
    return tuple(found[number] for number in numbers) if all(number in found for number in numbers) else None


def read_soundness(text: str) -> Soundness | None:
    """Read the last line `Sound: yes` or `Sound: no - "..."`; None where there is none.

    A line after a quotation mark counts only where there is no other; thinking blocks are ignored.
    """
    found = None
    text = mask_thinking(text)
    for match in sorted(_SOUND.finditer(text), key=lambda match: ">" not in text[match.start() : match.start("sound")]):
        sound = match["sound"].lower() == "yes"
        if sound and _RESTRICTED.match(match["words"]):
            continue
        words = "" if sound else match["words"].strip(" \t\r*_-–—.:;,()")
        found = Soundness(sound, words.strip(_QUOTES) or words)
    return found


def normalize(score: float) -> float:
    """Map a score of 1..5 to [0, 1]: (score - 1) / 4."""
    return (score - LOWEST) / (HIGHEST - LOWEST)


def expected_score(probabilities: Mapping[int, float]) -> float | None:
    """Compute the mean of the digits 1..5, weighted by probabilities that need not sum to 1; None where all are 0."""
    total = sum(probabilities.values())
    return sum(digit * p for digit, p in probabilities.items()) / total if total > 0 else None


def _last_stated(text: str) -> StatedScore | None:
    best = None
    for stated in stated_scores(mask_thinking(text)):
        if best is None or stated.rank >= best.rank:
            best = stated
    return None if best is None or best.scale != HIGHEST else best


def _score_within(stated: StatedScore | None) -> int | None:
    return int(stated.value) if stated is not None and LOWEST <= stated.value <= HIGHEST else None


def _quoted(text: str, match: re.Match) -> bool:
    return text[: match.start()].rstrip(" \t*_")[-1:] in tuple(_QUOTES)


def _released(text: str) -> StatedScore | None:
    word = "Score:" if "Score:" in text else "Score"
    place = text.find(word)
    if place < 0:
        return None
    place += len(word)
    for index, character in enumerate(text[place:].lstrip(), start=len(text) - len(text[place:].lstrip())):
        if character == "\n":
            return None
        if character not in "* \t\r\f\v":
            return StatedScore(float(character), index) if character.isdecimal() else None
    return None
