"""Finding the final answer, or the final program, in a trace's text."""

import re

LONGEST_ANSWER = 1000
"""Characters; anything longer is no answer."""

_FENCE = re.compile(r"[ \t]*```[ \t]*(?P<mark>[\w+#.-]*)[ \t]*")
_PYTHON_MARKS = {"python", "py", "python3"}
_BOX = re.compile(r"\\boxed\s*\{")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_ANS = re.compile(r"\bans\s+(\S+)")


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`; without one the rest of the line after the last `####`, then
    the word after the last `ans`. None where there is nothing, an empty, an unclosed or an overlong answer.
    """
    box = last_box(text)
    if box is not None:
        answer = box[1]
    else:
        found = _HASHES.findall(text) or _ANS.findall(text)
        answer = found[-1] if found else None
    if answer is None or not answer.strip() or len(answer) > LONGEST_ANSWER:
        return None
    return answer.strip()


def last_box(text: str) -> tuple[int, str | None] | None:
    r"""Where the last `\boxed{` begins and what it holds (None where it is not closed); None without a box."""
    boxes = list(_BOX.finditer(text))
    return (boxes[-1].start(), _up_to_closing_brace(text[boxes[-1].end() :])) if boxes else None


def extract_boxed_tail(text: str) -> str | None:
    r"""The text from the last `\boxed{` to its end, as stage 2 of the released code hands it to math-verify.

    None without a box, where the box is empty, or where what follows it is overlong too.
    """
    start = text.rfind(r"\boxed{")
    tail = text[start:]
    if start < 0 or r"\boxed{}" in tail or len(tail) > LONGEST_ANSWER:
        return None
    return tail


def extract_program(text: str) -> str | None:
    """The last fenced block marked as Python; without any such the last block without a mark.

    None where there is no such block, or where the last one is never closed.
    """
    blocks: dict[str, str | None] = {}
    mark, lines = None, []
    for line in text.replace("\r\n", "\n").split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence is not None and (mark is None or fence["mark"]):
            mark, lines = fence["mark"].lower(), []
            mark = "python" if mark in _PYTHON_MARKS else mark
            blocks[mark] = None
        elif fence is not None:
            blocks[mark] = "\n".join(lines)
            mark = None
        elif mark is not None:
            lines.append(line)
    return blocks["python"] if "python" in blocks else blocks.get("")


def _up_to_closing_brace(text: str) -> str | None:
    depth = 1
    for place, character in enumerate(text):
        escaped = place > 0 and text[place - 1] == "\\" and not text[:place].endswith("\\\\")
        if character in "{}" and not escaped:
            depth += 1 if character == "{" else -1
        if depth == 0:
            return text[:place]
    return None
