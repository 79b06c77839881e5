"""Extracts the final answer, or the final program, from the text of a trace."""

import re
import textwrap
from collections.abc import Callable
from html import unescape

from exprl_megatron.utils.thinking import mask_thinking

MAX_ANSWER_LENGTH = 1000
"""Largest length of an answer, in characters."""
_LONGEST_BETWEEN = 80
"""Largest number of characters between two boxes that are one answer."""

_Box = tuple[int, int, str | None]
"""Start, end and content of a box; the content is None where the box is not closed."""
# List and quotation marks may precede a fence, and prose may precede one that names its language.
_FENCE = re.compile(r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)")
_MARKERS = re.compile(r"(?:[ \t]*(?:>|[-*+]|\d{1,9}[.)])(?=[ \t]|$|`|~))*[ \t]*")
_QUOTED = re.compile(r"(?:[ \t]{0,3}>[ \t]?)+")
_LANGUAGE = re.compile(r"[\w+#.-]*")
_PYTHON = re.compile(r"(?:i|c|micro)?py(?:thon|py)?[\d.]*", re.I)
_ON_ONE_LINE = re.compile(r"(?P<fence>`{3,})[ \t]*(?:python\d?|py)[ \t]+(?P<program>[^`]+)(?P=fence)", re.I)
_HTML_CODE = re.compile(r"<code(?:\s+class=\"(?:language-|lang-)?(?P<language>[\w+#.-]+)\")?\s*>\n?")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_EMPTY = re.compile(r"\s|\\[,;:! ]|\\q?quad\b|~|\$")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_BARE = re.compile(r"[^\s${},;]+(?:\{[^{}]*\})*")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
_ANSWER_IS = re.compile(
    r"\banswer\b[*_]*(?:[ \t]*(?:is|:|=|(?=\$|\\\())[*_:]*\s*|[^.\n:=]{0,60}?\b(?:is|equals)\b[*_:]*[ \t]*)"
    r"(?P<answer>[^\n]+)",
    re.I,
)
_NOT = re.compile(r"\W*(?:not|n't|never|no longer|unclear|unknown|wrong|incorrect)\b", re.I)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_ANS = re.compile(r"\bans\s+(\S+)")
# Boxes that are one answer may be separated by a few words of a unit or a part, a separator, and a name.
_LATEX_SPACE = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}|\\q?quad\b|\\[,;:! ()\[\]]|[$~]|\\\\|&")
_UNIT = r"(?:(?!no\b|not\b|so\b|wait\b|then\b|thus\b|hence\b|is\b|or\b|and\b)[\w()/%-]+\s+)"
_SEPARATOR = r"(?:(?:[,;]|and|or|or else)\s*)"
_TOGETHER = re.compile(
    rf"\s*(?:{_UNIT}{{1,4}}{_SEPARATOR}{{1,3}}|{_SEPARATOR}{{0,3}})"
    r"(?:\(?\w\)|(?!no\b)\w{1,3}[.:])?\s*(?P<name>\\?[A-Za-z]\w*(?:_\{?\w+\}?)?\s*=)?\s*"
)
_NAME_BEFORE = re.compile(r"(?P<name>\\?[A-Za-z](?:_\{?\w+\}?)?\s*=)\s*[$\\(\[]*\s*$")


def extract_answer(text: str) -> str | None:
    r"""Return the final answer that `text` states outside of its thinking blocks.

    It is the content of the last boxes (boxes that are together are one answer, `1, 2`); without a box the rest of the
    line after the last `####`, then the text after the last "answer is", then the word after the last `ans`. None where
    there is no answer, or where it is overlong or its box is not closed.
    """
    text = mask_thinking(text)
    boxes = last_boxes(text)
    if boxes is None:
        answer = _stated(text)
    else:
        closed = [box.strip() for box in boxes if box is not None]
        if len(closed) < len(boxes):
            return None
        answer = ", ".join(dict.fromkeys(closed))
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_LENGTH:
        return None
    return answer.strip()


def last_boxes(text: str) -> list[str | None] | None:
    r"""Return the contents of the last boxes that are together, each with its name where all have names (`x = `).

    [None] where the last box is not closed. Empty boxes do not count; None where there is no other.
    """
    spans = _boxes(text)
    if not spans:
        return None
    if spans[-1][2] is None:
        return [None]
    group = _together(text, spans)
    if len(group) > 1 and all(name for _, name in group):
        return [f"{name} {box[2]}" for box, name in group]
    return [box[2] for box, _ in group]


def _together(text: str, spans: list[_Box]) -> list[tuple[_Box, str]]:
    """Return the last of the boxes `spans` that are together, each with the name before it (`x =`)."""
    group = [spans[-1]]
    names: list[str] = []
    for before, after in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
        between = _LATEX_SPACE.sub(lambda match: f" {match[1] or ''} ", text[before[1] : after[0]])
        joined = _TOGETHER.fullmatch(between) if before[2] is not None and len(between) <= _LONGEST_BETWEEN else None
        if joined is None:
            break
        group.insert(0, before)
        names.insert(0, joined["name"] or "")
    start = group[0][0]
    first = _NAME_BEFORE.search(text[max(0, start - _LONGEST_BETWEEN) : start])
    return list(zip(group, [first["name"] if first else "", *names], strict=True))


def last_box_group(text: str, accept: Callable[[str], bool]) -> tuple[int, str] | None:
    """Return start and content of the last boxes that are together and of which `accept` accepts one, or None.

    A box that is not closed is ignored.
    """
    spans = [box for box in _boxes(text) if box[2] is not None]
    while spans:
        group = _together(text, spans)
        contents = [content for (_, _, content), _ in group if content is not None]
        accepted = [content.strip() for content in contents if accept(content)]
        if accepted:
            return group[0][0][0], ", ".join(dict.fromkeys(accepted))
        spans = spans[: -len(group)]
    return None


def _boxes(text: str) -> list[_Box]:
    """Return start, end and content (None where it is not closed) of the outermost boxes that are not empty."""
    closing = _closing_braces(text)
    found: list[_Box] = []
    place = 0
    while (box := _BOX.search(text, place)) is not None:
        place = box.end()
        if text[place : place + 1] == "{":
            end = closing.get(place)
            content = None if end is None else text[place + 1 : end]
            place = place + 1 if end is None else end + 1
        else:
            bare = _BARE.match(text, place)
            content = bare[0] if bare else ""
            place += len(content)
        if content is None or _EMPTY.sub("", content):
            found.append((box.start(), place, content))
    return found


def _closing_braces(text: str) -> dict[int, int]:
    """Return the place of the closing brace of each closed brace; `\\{` and `\\}` do not count."""
    found, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            found[opened.pop()] = brace.start()
    return found


def _stated(text: str) -> str | None:
    """Return the answer of a text without a box."""
    if found := _HASHES.findall(text):
        return found[-1]
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        if not _NOT.match(match["answer"]):
            return _SENTENCE_END.split(match["answer"])[0].rpartition(" is ")[2]
    found = _ANS.findall(text)
    return found[-1] if found else None


def extract_boxed_tail(text: str) -> str | None:
    r"""Return the text from the last `\boxed{` to its end, which stage 2 of the released code passes to math-verify.

    None where there is no box, where the box is empty, or where this text is overlong.
    """
    start = text.rfind(r"\boxed{")
    tail = text[start:]
    if start < 0 or r"\boxed{}" in tail or len(tail) > MAX_ANSWER_LENGTH:
        return None
    return tail


def extract_program(text: str) -> str | None:
    """Return the last fenced block marked as Python outside of thinking blocks, or else the last one without a mark.

    Fences are those of Markdown: backticks or tildes, also indented, in lists and in quotations. A fence that opens a
    block of a named language within another block starts a new block, because models forget to close the first.
    Without fences an HTML block counts. None where there is no block, or where the last one is not closed.
    """
    text = mask_thinking(text).replace("\r\n", "\n")
    blocks: dict[str, str | None] = {}
    opened: _Opened | None = None
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if opened is not None and opened.closed_by(line):
            blocks[opened.language] = opened.program
            opened = None
        elif fence is not None and _opens(fence, opened):
            opened = _Opened(fence)
            blocks[opened.language] = None
        elif opened is not None:
            opened.lines.append(line)
        elif one := _ON_ONE_LINE.search(line):
            blocks["python"] = one["program"].strip()
    if not blocks and "</code>" in text:
        blocks = _html_block(text)
    return blocks["python"] if "python" in blocks else blocks.get("")


def _html_block(text: str) -> dict[str, str | None]:
    """Return the last `<pre><code>` block by its language."""
    end = text.rfind("</code>")
    start = text.rfind("<code", 0, end) if text.find("</pre>", end) >= 0 else -1
    tag = _HTML_CODE.match(text, start) if start >= 0 else None
    return {} if tag is None else {_language(tag["language"] or ""): unescape(text[tag.end() : end])}


class _Opened:
    """A fenced block that is being read."""

    def __init__(self, fence: re.Match):
        self.language = _language(fence["info"])
        self.lines: list[str] = []
        self._fence = fence["fence"]
        quoted = _QUOTED.match(fence["before"])
        self._quoted = quoted is not None
        before = fence["before"][quoted.end() if quoted else 0 :]
        self._indent = len(before.expandtabs(4)) if _MARKERS.fullmatch(before) else 0

    def may_contain(self, fence: str) -> bool:
        """Return whether such a fence within the block would start a new block instead of being text of this one."""
        return fence[0] == self._fence[0] and len(fence) >= len(self._fence)

    def closed_by(self, line: str) -> bool:
        """Return whether `line` ends the block: a fence alone, or one after the last line of the program."""
        bare = _unquoted(line).strip() if self._quoted else line.strip()
        if bare and set(bare) == {self._fence[0]} and len(bare) >= len(self._fence):
            return True
        if bare.endswith(self._fence) and bare.count(self._fence[0]) == len(self._fence):
            self.lines.append(line.rstrip()[: -len(self._fence)])
            return True
        return False

    @property
    def program(self) -> str:
        """The lines of the block without the quotation marks and the indentation of its fence."""
        lines = [_unquoted(line) if self._quoted else line for line in self.lines]
        first = next((line for line in lines if line.strip()), "").expandtabs(4)
        # A program that is less indented than its fence has its own left margin.
        indent = min(self._indent, len(first) - len(first.lstrip(" ")))
        program = "\n".join(_less_indented(line, indent) for line in lines)
        # A program cannot start indented: the indentation belongs to the layout of the text.
        return textwrap.dedent(program) if first.startswith(" ") else program


def _opens(fence: re.Match, opened: _Opened | None) -> bool:
    """Return whether a line with a fence opens a block, possibly within another block that was not closed."""
    info, before = fence["info"].strip(), fence["before"]
    if opened is not None:
        # Within a block only the name of a language distinguishes an opening fence from text.
        return bool(info) and _MARKERS.fullmatch(before) is not None and opened.may_contain(fence["fence"])
    return _MARKERS.fullmatch(before) is not None or (bool(info) and _PYTHON.fullmatch(info) is not None)


def _language(info: str) -> str:
    """Return `python` for every name of Python, else the first word of the fence's information in lower case."""
    found = _LANGUAGE.match(re.sub(r"^\{?\s*\.?(?:language-|lang-)?", "", info.strip()))
    name = found[0].lower() if found else ""
    return "python" if _PYTHON.fullmatch(name) else name


def _unquoted(line: str) -> str:
    quoted = _QUOTED.match(line)
    return line[quoted.end() :] if quoted else line


def _less_indented(line: str, indent: int) -> str:
    expanded = line.expandtabs(4) if indent and line[:1] in " \t" else line
    return expanded[min(indent, len(expanded) - len(expanded.lstrip(" "))) :]
