"""Which choice does a trace end on? Its letter, read from a box or from a sentence that states the answer."""

import re
import string
from collections.abc import Sequence

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rewards.extraction import last_box

_STATEMENT = re.compile(
    r"(?:####(?!#)|\b(?:answer|correct (?:option|choice))[*_]*\s*(?::|is\b:?|would be\b|must be\b|should be\b))"
    r"(?=\s*(?P<rest>[^\n]{0,1000}))",
    re.IGNORECASE,
)
_MOST_STATEMENTS = 100
"""Only so many are read, from the last; traces that got stuck hold thousands."""
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_ALONE = re.compile(r"(?:option|choice)?\s*\(?([A-Za-z])\)?", re.IGNORECASE)
_FIRST = re.compile(r"(?:[Oo]ption\s|[Cc]hoice\s)?\s*(?:\(([A-Za-z])\)|([A-Z])(?![\w'’]))")
_SEVERAL = re.compile(r"\(?[A-Z]\)?(?:\s*(?:,|;|/|&|\+|\band\b|\bor\b)\s*\(?[A-Z]\)?(?![\w'’]))+")
_PROSE = re.compile(r"\s+(?!(?:because|since|as|for|which|is|was)\b)[a-z]")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathsf|rm|bf)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"[$*`]|\\[()]")


def grade_choice(answer: str, choices: Sequence[str], trace_text: str) -> Judgement:
    r"""1.0 where the last statement of the trace names the choice `answer` (a letter) and no other, else 0.0.

    Statements are `\boxed{C}`, "Answer: C", "the answer is (C)", `#### C`; instead of the letter they may hold the
    text of exactly one of `choices`. A box always counts as a statement, a sentence only where a letter or a choice
    follows. Letters beyond the choices, and several letters at once, are wrong. Without `choices` (they may stand in
    the question) every letter of the alphabet is one. Abstains with `verifier-error` where `answer` is no choice.
    """
    letters = string.ascii_uppercase[: len(choices) or None]
    right = answer.strip(" ().").upper()
    if len(right) != 1 or right not in letters:
        return Abstained("verifier-error", f"the right answer {answer!r} is none of the letters {letters}")
    stated = _last_statement(trace_text, choices)
    return Scored(0.0, "no answer") if stated is None else Scored(float(stated == right), stated)


def _last_statement(text: str, choices: Sequence[str]) -> str | None:
    """The letter last stated, be it a choice's or not, or else what the last box holds."""
    found = []
    for statement in reversed(list(_STATEMENT.finditer(text))[-_MOST_STATEMENTS:]):
        line = statement["rest"]
        letter = _letter(line, choices) or _letter(_SENTENCE_END.split(line)[0], choices)
        if letter is not None:
            found.append((statement.start(), letter))
            break
    box = last_box(text)
    if box is not None:
        start, content = box
        content = (content or "").strip()
        found.append((start, _letter(content, choices) or content))
    return max(found)[1] if found else None


def _letter(fragment: str, choices: Sequence[str]) -> str | None:
    """The letter that the fragment begins with, or that of the choice that it states; None without either.

    Several letters, or a letter with the text of another choice, are given as they stand.
    """
    fragment = _plain(fragment)
    same = _with_text(fragment, choices)
    alone = _ALONE.fullmatch(fragment)
    # A lone letter beyond the choices may still be the text of one: "x" among x, y and z.
    if alone and (alone[1].upper() in string.ascii_uppercase[: len(choices) or None] or len(same) != 1):
        return alone[1].upper()
    if len(same) == 1:
        return same[0]
    if several := _SEVERAL.match(fragment):
        return several[0]
    first = _FIRST.match(fragment)
    rest = fragment[first.end() :] if first else ""
    if first is None or (first[2] and _PROSE.match(rest)):
        return None
    letter = (first[1] or first[2]).upper()
    others = _with_text(rest.lstrip(" .:)-"), choices)
    return letter if not others or letter in others else fragment


def _with_text(text: str, choices: Sequence[str]) -> list[str]:
    """The letters of the choices that read so."""
    wanted = _normalised(text)
    lettered = zip(string.ascii_uppercase, choices, strict=False)
    return [letter for letter, choice in lettered if _normalised(choice) == wanted]


def _normalised(text: str) -> str:
    return " ".join(_plain(text).casefold().split())


def _plain(text: str) -> str:
    """Without markup and the final stop."""
    return _MARKUP.sub("", _WRAPPED.sub(r"\1", text)).strip().strip("_").rstrip(".").rstrip()
