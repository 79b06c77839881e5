"""Reading a judge's verdict out of its words: a score of 1..5, or a mark for each checkpoint of a rubric."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored

LOWEST, HIGHEST = 1, 5

Parser = Literal["last", "released"]
Mark = Literal["established", "partial", "absent", "contradicted"]

# "Score: 4", "**Score:** 4", "Final score 4/5", "Score:\n\n[4]". Without a colon the number has to stand
# on the same line. ASCII only: look-alikes of letters and digits are no score.
_SCORE = re.compile(
    r"(?<![a-z])score[*_]*(?:[ \t]*(?P<colon>:)[\s*_\[(]*|[ \t]+[*_\[(]*)"
    r"(?P<number>[+-]?\d+(?:\.\d+)?)(?:\s*/\s*(?P<scale>\d+))?",
    re.IGNORECASE | re.ASCII,
)
_MARK = re.compile(
    r"(?<![a-z])mark[*_ \t]*(?P<checkpoint>\d+)[*_ \t]*:[\s*_\[(]*(?P<mark>established|partial|absent|contradicted)\b",
    re.IGNORECASE | re.ASCII,
)
_QUOTES = "\"'`“”‘’«»„「>"


@dataclass(frozen=True)
class StatedScore:
    """A score as the judge wrote it."""

    value: float
    """Whatever it is, 7 and -1 too."""
    place: int
    """Index of its first character in the text."""


def stated_score(text: str, parser: Parser = "last") -> StatedScore | None:
    """The score that `text` states; None where it states none.

    `last`: a judge that goes through several scores means the last one. What directly follows a quotation mark is
    somebody else's score, and counts only where there is no other; so does a score without a colon. A score out of
    something other than 5 is on another scale and counts as not stated.

    `released`, as the released code reads: the first character of the first line after the first `Score:` (or else
    the first `Score`), asterisks left out.
    """
    return _last_stated(text) if parser == "last" else _released(text)


def parse_score(text: str, parser: Parser = "last") -> int | None:
    """The score that `text` states, where it is within 1..5 (the fraction of 4.5 is dropped), else None."""
    stated = stated_score(text, parser)
    return int(stated.value) if stated is not None and LOWEST <= stated.value <= HIGHEST else None


def read_verdict(text: str, parser: Parser = "last") -> Judgement:
    """A judge's words as a judgement: the score in [0, 1], or an abstention that says why."""
    score = parse_score(text, parser)
    if score is not None:
        return Scored(normalise(score), text)
    return Abstained("unreadable" if stated_score(text, parser) is None else "out-of-range", text)


def read_marks(text: str, checkpoints: int) -> tuple[Mark, ...] | None:
    """The marks of checkpoints 1, 2, ..., each in the last line `Mark N: ...` about it; None where one is missing.

    What directly follows a quotation mark counts only where nothing else does.
    """
    found: dict[int, Mark] = {}
    for match in sorted(_MARK.finditer(text), key=lambda match: not _quoted(text, match)):
        found[int(match["checkpoint"])] = match["mark"].lower()
    marks = tuple(found.get(number) for number in range(1, checkpoints + 1))
    return None if None in marks else marks


def normalise(score: float) -> float:
    """A score of 1..5 as a number in [0, 1]: (score - 1) / 4."""
    return (score - LOWEST) / (HIGHEST - LOWEST)


def expected_score(probabilities: Mapping[int, float]) -> float | None:
    """The mean over the digits 1..5 under their probabilities, which need not sum to 1; None where all are 0."""
    total = sum(probabilities.values())
    return sum(digit * p for digit, p in probabilities.items()) / total if total > 0 else None


def _last_stated(text: str) -> StatedScore | None:
    matches = list(_SCORE.finditer(text))
    if not matches:
        return None
    match = max(matches, key=lambda match: (match["colon"] is not None, not _quoted(text, match), match.start()))
    if match["scale"] not in (None, str(HIGHEST)):
        return None
    return StatedScore(float(match["number"]), match.start("number"))


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
