"""Finding the final answer in a trace's text."""

import re

LONGEST_ANSWER = 1000
"""Characters; anything longer is no answer."""

_BOX = re.compile(r"\\boxed\s*\{")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_ANS = re.compile(r"\bans\s+(\S+)")


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`; without one the rest of the line after the last `####`, then
    the word after the last `ans`. None where there is nothing, an empty, an unclosed or an overlong answer.
    """
    boxes = list(_BOX.finditer(text))
    if boxes:
        answer = _up_to_closing_brace(text[boxes[-1].end() :])
    else:
        found = _HASHES.findall(text) or _ANS.findall(text)
        answer = found[-1] if found else None
    if answer is None or not answer.strip() or len(answer) > LONGEST_ANSWER:
        return None
    return answer.strip()


def _up_to_closing_brace(text: str) -> str | None:
    depth = 1
    for place, character in enumerate(text):
        escaped = place > 0 and text[place - 1] == "\\" and not text[:place].endswith("\\\\")
        if character in "{}" and not escaped:
            depth += 1 if character == "{" else -1
        if depth == 0:
            return text[:place]
    return None
