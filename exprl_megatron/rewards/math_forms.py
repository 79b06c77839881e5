r"""Compares answers in forms that math-verify reads too loosely or not at all, before math-verify is called.

Plain numbers are compared relatively (it rounds to six decimals, so that 1e-7 and 2e-7 are equal); clock times, numbers
of different bases, ordered pairs and sets, and values with names are distinguished (it treats 12:30 and 6:15 as equal
ratios, ignores bases, and sorts).
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from exprl_megatron.rewards.answer_markup import MAX_EXPONENT, closing_bracket, normalize_answer, without_text

Compare = Callable[[str, str], bool]

RELATIVE_TOLERANCE = 2e-5
"""Largest relative difference of equal decimals; the largest absolute one is 5e-7, as in math-verify."""
_ABSOLUTE_TOLERANCE = 5e-7

_POWER_OF_TEN = re.compile(
    r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d{1,4})\s*\}?"
)
_MIXED = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d+)\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)")
_PLAIN = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+|\d{1,3}(?:,\d{3})+(?:\.\d*)?)")
_FRACTION = re.compile(
    r"([+-]?)\s*(?:\\[dt]?frac\s*\{\s*([+-]?\d+)\s*\}\s*\{\s*([+-]?\d+)\s*\}|\\[dt]?frac\s*(\d)\s*(\d)|(\d+)\s*/\s*(\d+))"
)
_CLOCK = re.compile(r"(\d{1,2}) ?: ?(\d{2})(?: ?: ?(\d{2}))?\s*(?:([ap])\.?\s*m\.?)?", re.I)
_CLOCK_TEXT = re.compile(r"\\(?:text|mathrm|,|;|:|!| )|[{}~]|\\?\s+")
_BASE_NAMES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9},
    **{"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16},
}
_BASED = re.compile(
    r"\(?\s*(?P<digits>[0-9][0-9A-Za-z.]*)\s*\)?\s*"
    r"(?:_\s*(?:\{\s*)?\(?(?P<below>\d{1,2}|[a-z]{3,7})\)?(?:\s*\})?|\(?\s*(?:in\s+)?base\s*(?P<words>\d{1,2}|[a-z]{3,7})\s*\)?)"
)
_NAMED = re.compile(r"\s*(\\?[A-Za-z]+|\\?[A-Za-z]+_(?:\{?\w+\}?))\s*(?:=|\\approx)\s*(.+)", re.S)
_PAIR_OF = re.compile(r"\(\s*\\?[A-Za-z]\w*(?:\s*,\s*\\?[A-Za-z]\w*)+\s*\)\s*=\s*(?=\()")
_ROOT_NAME = re.compile(r"\\?[xyzt](?:_\d+)?")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s-]+[^\W\d_]+)*")


def same_answer(gold: str, answer: str, by_math_verify: Compare) -> bool:
    """Return whether `answer` is `gold` in another form; `by_math_verify` compares what cannot be decided here."""
    gold, answer = normalize_answer(gold), normalize_answer(answer)
    if gold == answer:
        return True
    if not answer:
        return False
    for decide in (_same_clock, _same_base, _same_number, _same_words):
        decided = decide(gold, answer)
        if decided is not None:
            return decided
    if _false_chain(gold, answer):
        return False
    return _same_list(gold, answer, by_math_verify)


def _same_clock(gold: str, answer: str) -> bool | None:
    gold_time, answer_time = _clock(gold), _clock(answer)
    if gold_time is None:
        return None
    if answer_time is not None:
        (first, first_half), (second, second_half) = gold_time, answer_time
        if first_half and second_half:
            return _on_24_hours(first, first_half) == _on_24_hours(second, second_half)
        if first_half or second_half:
            half = first_half or second_half
            return first == second or _on_24_hours(first, half) == _on_24_hours(second, half)
        return first == second
    (hours, minutes, _), half = gold_time
    # 3:10 may be a ratio; 12:30 is not, since it is not in its lowest terms.
    ratio = not half and minutes and not gold.startswith("0") and Fraction(hours, minutes).denominator == minutes
    return None if ratio else False


def _clock(text: str) -> tuple[tuple[int, int, int], str] | None:
    match = _CLOCK.fullmatch(_CLOCK_TEXT.sub(" ", text).strip())
    if match is None or int(match[1]) > 24 or int(match[2]) > 59:
        return None
    return (int(match[1]), int(match[2]), int(match[3] or 0)), (match[4] or "").lower()


def _on_24_hours(time: tuple[int, int, int], half: str) -> tuple[int, int, int]:
    hours = time[0] if time[0] > 12 else time[0] % 12 + (12 if half == "p" else 0)
    return (hours, *time[1:])


def _same_base(gold: str, answer: str) -> bool | None:
    """Return whether digits and base are equal; the answer may omit the base, which the question names."""
    wanted, given = _based(gold), _based(answer)
    if wanted is None:
        return None if given is None or given[1] == 10 else False
    if given is None:
        plain = re.sub(r"[\s{},\\]", "", answer)
        return plain.lstrip("0") == wanted[0].lstrip("0") if re.fullmatch(r"[0-9A-Za-z.]+", plain) else False
    return (wanted[0].lstrip("0"), wanted[1]) == (given[0].lstrip("0"), given[1])


def _based(text: str) -> tuple[str, int] | None:
    """Return digits and base of a numeral such as 204_5."""
    match = _BASED.fullmatch(re.sub(r"\s+", " ", without_text(text)).strip())
    if match is None:
        return None
    base = match["below"] or match["words"]
    number = int(base) if base.isdigit() else _BASE_NAMES.get(base)
    return None if number is None else (match["digits"].upper(), number)


def _same_number(gold: str, answer: str) -> bool | None:
    first, second = _number(gold), _number(answer)
    if first is None or second is None:
        return None
    return same_value(first, second, exactly=not ({"."} & {*gold, *answer} or "10" in gold + answer))


def same_value(first: Fraction, second: Fraction, exactly: bool = False) -> bool:
    """Return whether two numbers are equal, or equal when rounded as their decimals are."""
    if first == second or exactly:
        return first == second
    difference = abs(first - second)
    return difference <= _ABSOLUTE_TOLERANCE and difference <= RELATIVE_TOLERANCE * max(abs(first), abs(second))


def _number(text: str) -> Fraction | None:
    """Return the value of a plain number, a fraction of integers, or a number times a power of ten."""
    text = text.strip()
    try:
        if _PLAIN.fullmatch(text):
            return Fraction(Decimal(text.replace(",", "")))
        if (match := _POWER_OF_TEN.fullmatch(text)) and abs(int(match[2])) <= MAX_EXPONENT:
            return Fraction(Decimal(match[1]).scaleb(int(match[2])))
        if (match := _MIXED.fullmatch(text)) and int(match["above"]) < int(match["below"]):
            value = int(match["whole"]) + Fraction(int(match["above"]), int(match["below"]))
            return value * (-1 if match["sign"] == "-" else 1)
        if match := _FRACTION.fullmatch(text):
            above, below = [group for group in match.groups()[1:] if group]
            return Fraction(int(above), int(below)) * (-1 if match[1] == "-" else 1)
    except (InvalidOperation, ZeroDivisionError):
        pass
    return None


def _same_words(gold: str, answer: str) -> bool | None:
    """Return whether words are equal without regard to case; undecided (None) where either is more than words."""
    texts = [" ".join(without_text(text).replace("~", " ").split()).strip(" .").casefold() for text in (gold, answer)]
    same = texts[0] == texts[1] and _WORDS.fullmatch(texts[0])
    return True if same else None


def _false_chain(gold: str, answer: str) -> bool:
    """Return whether the answer is a chain of equations such as 1 = 2 = 5 in which plain numbers differ."""
    if "=" in gold:
        return False
    numbers = [number for part in re.split(r"(?<![<>!:\\])=", answer) if (number := _number(part)) is not None]
    return len(numbers) > 1 and not all(same_value(number, numbers[-1]) for number in numbers)


def _same_list(gold: str, answer: str, by_math_verify: Compare) -> bool:
    """Compare lists with regard to names and order, and anything else as a whole."""
    wanted, given = _List(gold), _List(answer)
    gold, answer = wanted.text, given.text
    if wanted.named and given.named:
        return wanted.named.keys() == given.named.keys() and all(
            same_answer(value, given.named[name], by_math_verify) for name, value in wanted.named.items()
        )
    if wanted.named:
        return _in_order(list(wanted.named.values()), given, by_math_verify)
    if given.named:
        values = [given.named[name] for name in sorted(given.named)]
        answer = f"({', '.join(values)})" if wanted.kind == "ordered" else ", ".join(values)
        return _same_list(gold, answer, by_math_verify)
    if {wanted.kind, given.kind} == {"ordered", "set"}:
        return False
    if given.kind == "ordered" and wanted.kind == "bare" and len(given.items) == len(wanted.items):
        return _in_order(wanted.items, given, by_math_verify)
    return by_math_verify(gold, answer)


def _in_order(values: list[str], given: "_List", by_math_verify: Compare) -> bool:
    return (
        given.kind != "set"
        and len(given.items) == len(values)
        and all(same_answer(value, item, by_math_verify) for value, item in zip(values, given.items, strict=True))
    )


class _List:
    """An answer taken apart at its commas: `kind` is `ordered` (a, b), `set`, `bare` a, b, or `single`."""

    def __init__(self, text: str):
        text = re.sub(r"\\(?:left|right|[bB]ig+[lr]?)(?![a-zA-Z])", "", text).strip()
        self.text = text = _PAIR_OF.sub("", text, count=1)
        bracket = text[:2] if text[:2] == r"\{" else text[:1]
        inner = text[len(bracket) :]
        self.kind = {r"\{": "set", "(": "ordered", "[": "ordered"}.get(bracket, "bare")
        if self.kind != "bare":
            opened = len(bracket) - 1
            if closing_bracket(text, opened) == len(text) - 1:
                text = inner[: -len(bracket)]
            else:
                self.kind = "bare"
        self.items = _split(text)
        self.named: dict[str, str] = {}
        if self.kind == "bare" and len(self.items) > 1:
            self._read_names()
        if len(self.items) < 2 and self.kind != "set":
            self.kind = "single"

    def _read_names(self) -> None:
        """Keep values by name where every item has its own; roots of one unknown (x_1, x_2) are not ordered."""
        pairs = [pair for item in self.items if (pair := _NAMED.fullmatch(item))]
        if len(pairs) < len(self.items):
            return
        names = [re.sub(r"[{}\s]", "", pair[1]) for pair in pairs]
        if len({name.partition("_")[0] for name in names}) == 1 and all(map(_ROOT_NAME.fullmatch, names)):
            self.items = [pair[2] for pair in pairs]
            self.text = ", ".join(self.items)
        elif len(set(names)) == len(names):
            self.named = {name: pair[2] for name, pair in zip(names, pairs, strict=True)}


def _split(text: str) -> list[str]:
    """Split at commas, semicolons and `and` outside of brackets."""
    text = re.sub(r",?\s*\band\b\s*", ", ", without_text(text)) if "and" in text else text
    text = re.sub(r"\\q?quad\b|\\[,;:! ]", " ", text)
    parts, start, depth = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ",;":
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]
