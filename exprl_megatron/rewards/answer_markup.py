r"""Markup of answers: removes it, and writes numbers as math-verify reads them.

`1 000`, `1e-5`, `**5**` and `5.` are converted to forms that it reads.
"""

import re
import unicodedata
from decimal import Decimal

MAX_EXPONENT = 60
"""Larger powers of ten are not written out."""
_UNICODE = str.maketrans(
    {
        **{
            "−": "-",
            "–": "-",
            "×": r"\times ",
            "·": r"\cdot ",
            "⋅": r"\cdot ",
            "÷": "/",
            "∞": r"\infty ",
            "°": r"^\circ ",
        },
        **{"π": r"\pi ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "⁄": "/"},
    }
)
_ROOT = re.compile(r"√\s*(\d+|\w|\([^()]*\))")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|mathbf|mathrm|mathit|mathsf|boldsymbol|bm|mbox|underline|boxed|fbox|displaystyle|bf|rm|emph)\s*"
)
_SPACING = r"\s|\\[,;:! ]|\\q?quad\b|[$`]|\*\*|__|~"
_EDGES = re.compile(
    rf"^(?:{_SPACING}|\\(?:displaystyle|textstyle|bf|rm|approx)\b|\\[(\[]|[:=](?!=))+"
    rf"|(?:{_SPACING}|\\[)\]]|(?<!\.)\.|[,;:]|(?<![\w)\]}}])!|\\$)+$"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|~|\{,\}|[ '’\u00a0\u2009\u202f])\d{3})+(?!\d)")
_E_NOTATION = re.compile(r"(?<![\w.\\^{])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,4})(?![\w.])")
_SENTENCE = re.compile(
    r"^\\text\s*\{[^{}]*\b(?:answer|result|solution)\b[^{}]*\}|^(?:the )?(?:final )?answer is\b:?", re.I
)
_WITH_UNIT = re.compile(
    r"(?P<number>[+-]?\\?\$?[\d.,]+)\s+(?!(?:or|and|to|not|mod|pi|plus|minus|times|over|divided|squared|cubed|sqrt|sin|cos|tan"
    r"|log|ln|exp|theta|alpha|beta|million|billion|thousand|hundred|dozen|percent)\b)[A-Za-z]{2,}(?:[ -][A-Za-z]+){0,3}"
)
_OR = re.compile(r"\(\s*or\b([^()]*)\)|,?\s*\bor\b|\\lor\b")


def normalize_answer(text: str) -> str:
    """Remove markup and final punctuation, use ASCII signs, and write numbers as math-verify reads them."""
    text = unicodedata.normalize("NFKC", text).translate(_UNICODE)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('()')}}}", text)
    before = None
    while before != text:
        before = text
        text = _EDGES.sub("", text).strip()
        text = _unwrapped(text)
    text = _EDGES.sub("", _SENTENCE.sub("", text)).strip()
    if unit := _WITH_UNIT.fullmatch(text):
        text = unit["number"]
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _E_NOTATION.sub(lambda match: _expanded(match[1], match[2]) or match[0], text)
    return _OR.sub(lambda match: f", {match[1] or ''}", without_text(text)) if "or" in text else text


def without_text(text: str) -> str:
    """Move words out of `\\text{...}`, so that an `or` in them is recognized."""
    return re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r" \1 ", text)


def closing_bracket(text: str, start: int) -> int:
    """Return where the bracket at `start` is closed; -1 where it is not."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
            if depth == 0:
                return place
    return -1


def _unwrapped(text: str) -> str:
    """Remove a command or braces around the whole text."""
    wrapper = _WRAPPER.match(text)
    start = wrapper.end() if wrapper else 0
    if text[start : start + 1] == "{" and closing_bracket(text, start) == len(text) - 1:
        return text[start + 1 : -1]
    return text


def _expanded(mantissa: str, exponent: str) -> str | None:
    if abs(int(exponent)) > MAX_EXPONENT:
        return None
    return format(Decimal(mantissa).scaleb(int(exponent)), "f")
