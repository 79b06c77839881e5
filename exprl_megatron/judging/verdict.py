"""Reading a judge's score out of its words."""

import re

LOWEST, HIGHEST = 1, 5

# "Score: 4", "**Score:** 4", "Final score 4/5", "Score:\n\n[4]". Without a colon the number has to stand
# on the same line. ASCII only: look-alikes of letters and digits are no score.
_SCORE = re.compile(
    r"(?<![a-z])score[*_]*[ \t]*(?::[\s*_\[(]*|[ \t*_\[(]+)"
    r"(?P<number>[+-]?\d+(?:\.\d+)?)(?:\s*/\s*(?P<scale>\d+))?",
    re.IGNORECASE | re.ASCII,
)


def stated_score(text: str) -> float | None:
    """The number of the last score that `text` states, whatever it is; None where it states none.

    A judge that goes through several scores means the last one. A score out of something other than
    5 is on another scale and counts as not stated.
    """
    matches = list(_SCORE.finditer(text))
    if not matches or matches[-1]["scale"] not in (None, str(HIGHEST)):
        return None
    return float(matches[-1]["number"])


def parse_score(text: str) -> int | None:
    """The last score stated, where it is within 1..5 (the fraction of 4.5 is dropped), else None."""
    stated = stated_score(text)
    return int(stated) if stated is not None and LOWEST <= stated <= HIGHEST else None


def normalise(score: int) -> float:
    """A score of 1..5 as a number in [0, 1]: (score - 1) / 4."""
    return (score - LOWEST) / (HIGHEST - LOWEST)
