r"""Finds the scores that a judge states in its answer, and rejects text that only looks like a score.

A score follows `Score:` ("Score: 4", "**Score (1-5):** 4", "Final score for the trace: 4/5", "Score:\n\n[4]"),
`<score>`, a heading `## Score`, or, with less certainty, "score" or "the score is" within a line. These are not scores:
a scale ("Score: 1-5"), a legend ("Score: 5 = perfect"), another scale ("Score: 4/10"), the score of something else
("Maximum score: 5"), a condition ("If all is right, Score: 5."), a denial ("this is no Score: 5"), and `Score = 4`, the
form in which a trace's own statements reach the judge (see InjectionGuard). Only ASCII letters and digits count.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

LOWEST, HIGHEST = 1, 5
_LONGEST = 400
"""Number of characters on each side of the word `score` that are read."""

_WORD = re.compile(r"(?<![a-z])score(?![a-z])", re.I | re.A)
_MARKS = r"[*_`\"']*"
_SPACE = r"[ \t]*"
_SCALE = re.compile(r"(?:\d+\s*(?:-|–|—|to|and|through|\.\.+|/)\s*|out of\s+(?:a\s+)?|/\s*|max(?:imum)?\W*)(\d+)", re.I)
_BRACKETED = r"\([^()\n]{0,80}\)|\[[^\[\]\n]{0,80}\]"
_BARE_SCALE = r",?[ \t]*(?:(?:on|from|out|in|using|between)\b|/|\d)[^\n:：.!?]{0,25}\d(?:[ \t-]*(?:point )?scale)?"
_OF_WHAT = r"(?:for|of|given|assigned|awarded|I|out|is)\b[^\n.:：!?\"]{0,60}"
_LABEL = rf"(?P<label>{_BRACKETED}|{_BARE_SCALE})?{_SPACE}{_MARKS}{_SPACE}(?:{_OF_WHAT})?"
_OPENING = r"(?:\n[ \t]*>|[\s*_`\"'“”‘’«»「\[({<$]|\\(?:boxed|text|textbf|mathbf|\[|\())*"
STATEMENT = rf"score{_MARKS}{_SPACE}{_LABEL}{_MARKS}\s*[:：](?={_OPENING}[+\-−]?\d)"
"""Matches a statement with a colon, up to and including the colon."""
_NUMBER = r"(?P<number>[+-]?\d+(?:\.\d+)?)"
_WITH_COLON = re.compile(rf"{_MARKS}{_SPACE}{_LABEL}{_MARKS}{_SPACE}[:：]{_OPENING}{_NUMBER}", re.I | re.A)
_WITH_TAG = re.compile(rf">\s*{_NUMBER}(?=(?:\s*/\s*\d+)?\s*</score>)", re.I | re.A)
_ALONE = r"(?=(?:\s*/\s*\d+)?[*_`\])$. \t]*(?:\n|</?\w|<\||$))"
_HEADING = re.compile(
    rf"{_MARKS}{_SPACE}(?:{_BRACKETED})?{_MARKS}{_SPACE}#*\n[\s*_=-]*[*_`\[($]*{_NUMBER}{_ALONE}", re.I | re.A
)
_ON_THE_LINE = re.compile(rf"{_MARKS}[ \t]+(?:is[ \t]+)?[*_`\[(]*{_NUMBER}", re.I | re.A)

_OTHER_SCALE = re.compile(
    r"[ \t*_`$})\]]*[\[(,]?[ \t]*(?:/|(?:out )?of\b|on (?:a|the) scale (?:of|from)\b)[\s*_]*"
    r"(?:(?:a|the|max(?:imum)?|total|possible|of)\s+)*(?:\d+\s*(?:-|–|to|\.\.)\s*)?(?P<scale>\d+)",
    re.I,
)
_SEVERAL = re.compile(
    r"(?:[-–—~]|\.\.+|…|[ \t]*(?:[+*^→⇒]|[-=]>)[ \t]*)\d|[⁰¹²³⁴-⁹]|[ \t]*\\?%|[ \t]*percent\b"
    # "3 or 4.", "1, 2, 3": numbers follow; "4, 2 steps are wrong": words do.
    r"|[ \t]*(?:-|–|—|,|;|\||to|or|and|through)[ \t]*\d+(?:\.\d+)?\s*(?:[^\w\s]|or\b|and\b|$)",
    re.I | re.M,
)
_LEGEND = re.compile(
    r"[ \t*_`)\]]*(?:=|[:：][ \t]*\w|(?:means|is for|stands for|for an?|if|would|needs?|requires?|is reserved)\b)", re.I
)
_OTHER_KIND = re.compile(
    r"\b(?:max(?:im(?:um|al))?|highest|best|perfect|full|top|possible|attainable|min(?:imum)?|lowest|worst|target|passing"
    r"|threshold|previous|prior|expected|claimed|own|self|sub|step|partial|average|mean|example|sample|raw|preliminary"
    r"|provisional|tentative|initial|f1|z)[ \t_-]*$",
    re.I,
)
_CONDITION = re.compile(
    r"^\W*(?:(?:but|and|so|then|even|only)\s+)*(?:if|had|were|unless|suppos\w+|assum\w+|for (?:example|instance)|e\.g"
    r"|an example|imagine|whether|to (?:get|earn|deserve|reach|obtain|receive|achieve|merit))\b",
    re.I,
)
_DENIAL = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\brather than|\binstead of|\bno)\s+"
    r"(?:(?:an?|the|any|this|that|it|give|get|merit|deserve|earn|assign|award|be|is|worth|of|quite|full|say|call|claim)\s+){0,4}\W*$",
    re.I,
)
_CLAIM = re.compile(
    r"\b(?:claims?|claimed|says?|said|states|stated|writes|wrote|asserts?|ends with|itself|demands?|asks? for)\b"
    r"(?:\s+(?:that|to|a|an|the|be|give|for))*[\s:,]*[\"'`*_“”‘’«»„]+$",
    re.I,
)
_VERB = re.compile(r"\b(?:would|could|should|might|will|can|to)\s+(?:\w+ly\s+)?$", re.I)
_CLAUSE_END = re.compile(r"[.!?;]\s|\n")
_FEW_WORDS = re.compile(r"\W*(?:\w+\W+){0,4}")
_QUOTES = "\"'`“”‘’«»„「>"


@dataclass(frozen=True)
class StatedScore:
    """A score as the judge wrote it."""

    value: float
    """The number as stated, which may be outside of the scale."""
    position: int
    """Index of its first character in the text."""
    scale: int = HIGHEST
    """The highest score of the scale that it names; 5 where it names none."""
    rank: tuple[bool, ...] = ()
    """How likely this is the verdict: it has the requested form, it is not quoted, it begins a sentence."""


def stated_scores(text: str) -> Iterator[StatedScore]:
    """Yield every score that `text` states, in order, including those on other scales."""
    for word in _WORD.finditer(text):
        start = max(0, word.start() - _LONGEST)
        before, after = text[start : word.start()], text[word.end() : word.end() + _LONGEST]
        forms = (_WITH_COLON, _WITH_TAG, _HEADING, _ON_THE_LINE)
        found = next((match for form in forms if (match := form.match(after))), None)
        if found is None or not _is_statement(before, after, found):
            continue
        quoted = before.rstrip(" \t*_")[-1:] in tuple(_QUOTES) and found.re is not _WITH_TAG
        yield StatedScore(
            value=float(found["number"]),
            position=word.end() + found.start("number"),
            scale=_scale(found, after),
            rank=(found.re is not _ON_THE_LINE, not quoted, _FEW_WORDS.fullmatch(_clause(before)) is not None),
        )


def _is_statement(before: str, after: str, found: re.Match) -> bool:
    """Return whether the judge gives this score, rather than only mentioning it."""
    clause, rest = _clause(before), after[found.end() :]
    if any(sign.search(clause) for sign in (_OTHER_KIND, _CONDITION, _DENIAL, _CLAIM, _VERB)):
        return False
    return not (_SEVERAL.match(rest) or _LEGEND.match(rest))


def _clause(before: str) -> str:
    """Return the text between the end of the last sentence or line and the word."""
    ends = list(_CLAUSE_END.finditer(before))
    return before[ends[-1].end() if ends else 0 :]


def _scale(found: re.Match, after: str) -> int:
    """Return the highest score of the scale that the label or the text after the number names, else 5."""
    label = _SCALE.search(found.groupdict().get("label") or "")
    other = _OTHER_SCALE.match(after[found.end() :])
    named = other["scale"] if other else label[1] if label else HIGHEST
    return int(named)
