"""The verifier of the released first stage (verl's `prime_math`), which rewards its sparse GRPO baseline.

The answer is the text after "answer is" anywhere, otherwise the part of the whole response after the last "is" or "=";
a box in it takes precedence. Two numbers are equal within a relative 1e-4, and a percentage equals its number. Anything
else is compared by math-verify, where the released code uses parsers of sympy.
"""

import re
from collections.abc import Callable
from math import isclose

MAX_ANSWER_LENGTH = 1000
"""Number of characters that are compared."""
_ANSWER_FOLLOWS = ("answer:", "answer is", "answers are")
_ANSWER_PRECEDES = ("is answer", "is the answer", "are answers", "are the answers")
_VALUE_FOLLOWS = ("be ", "is ", "are ", "=", ": ", "get ", "be\n", "is\n", "are\n", ":\n", "get\n")
_IGNORED = re.compile(r"\\(?:left|right|!|,|;|:|\$|%)|\^\{?\\circ\}?|[\s$%]")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_BRACKETS = ("()", "[]")


def extract_prime_answer(text: str) -> str:
    """Return what the released first stage treats as the answer; the whole response where nothing marks an answer."""
    for marker in _ANSWER_FOLLOWS:
        text = _after_last(text, marker)
    for marker in _ANSWER_PRECEDES:
        place = text.lower().rfind(marker)
        text = text if place < 0 else text[:place].strip()
    text = _last_box(text) or text
    if ". " in text:
        text = text[: text.rfind(". ")].strip()
    for marker in _VALUE_FOLLOWS:
        text = _after_last(text, marker)
    return text


def same_as_prime(gold: str, answer: str, compare: Callable[[str, str], bool]) -> bool:
    """Return whether `answer` counts as `gold`; `compare` compares texts that are not numbers, and may raise."""
    wanted, found = (_plain(text) for text in (gold, answer[:MAX_ANSWER_LENGTH]))
    if wanted == found:
        return True
    number, other = _number(wanted), _number(found)
    if number is not None and other is not None:
        return any(isclose(number * factor, other, rel_tol=1e-4) for factor in (0.01, 1, 100))
    if not found:
        return False
    parts = _parts(wanted), _parts(found)
    if len(parts[0]) > 1 and len(parts[0]) == len(parts[1]):
        return all(same_as_prime(*pair, compare) for pair in zip(*parts, strict=True))
    return compare(wanted, found)


def _after_last(text: str, marker: str) -> str:
    place = text.lower().rfind(marker)
    return text if place < 0 else text[place + len(marker) :].strip()


def _last_box(text: str) -> str | None:
    r"""Return the text in the braces after the last `\boxed`, or else `\fbox`; None where they are not closed."""
    start = text.rfind(r"\boxed") if r"\boxed" in text else text.rfind(r"\fbox")
    first = text.find("{", start) if start >= 0 else -1
    depth = 0
    for place in range(first, len(text)) if first >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first + 1 : place].strip()
    return None


def _plain(text: str) -> str:
    """Remove spaces, signs of units and the sizes of fractions and brackets; convert to lower case."""
    text = _IGNORED.sub("", _TEXT.sub(r"\1", text.strip()))
    return text.replace("tfrac", "frac").replace("dfrac", "frac").lower()


def _number(text: str) -> float | None:
    try:
        return float(text.replace("{,}", "").replace(",", ""))
    except ValueError:
        return None


def _parts(text: str) -> list[str]:
    """Return the elements of a tuple, an interval or a list; its two brackets may differ in kind."""
    inner = text[1:-1] if text[:1] + text[-1:] in _BRACKETS else text
    return inner.split(",")
