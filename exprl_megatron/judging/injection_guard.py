"""Guards a judge against prompt injection: sanitizes problem, reference and trace before the judge reads them.

A policy is trained on the judge's score of its traces, so it finds every injection that works. Four things are
changed, and nothing else:

* invisible characters (zero-width, bidirectional marks, other control characters) are removed;
* tags like those that the prompt puts around its data, also in look-alike letters and brackets, get square brackets:
  `</trace>` becomes `[/trace]`, so that data cannot end its section;
* control tokens of chat templates are split: `<|im_end|>` becomes `< |im_end|>`, so that data cannot open a turn;
* statements in the form of the judge's verdict lose their colon: `Score: 5` becomes `Score = 5` (and a line `Score`
  above a number `Score =`, `<score>` `[score]`), so that a judge that quotes the trace states no score.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from exprl_megatron.judging.stated_scores import STATEMENT

_LINE_ENDS = {0x0B, 0x0C, 0x0D, 0x85, 0x2028, 0x2029}
# Format, control, surrogate, private use.
_UNSEEN = ("Cf", "Cc", "Cs", "Co")

_OPEN, _CLOSE = r"(?:[<＜﹤‹〈⟨❬⟪《«˂≺ᐸ]|&lt;)", r"(?:[>＞﹥›〉⟩❭⟫》»˃≻ᐳ]|&gt;)"
_NAME = r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f])*"
_ANGLED = re.compile(rf"{_OPEN}(?P<inner>[\s/／⁄∕\\⧸]*(?P<name>{_NAME})(?:[\s/／=:.\-][^<>\n]{{0,80}}?)?){_CLOSE}")
_LOOK_ALIKES = {
    **{"a": "аɑα", "b": "Ьь", "c": "сϲ", "d": "ԁ", "e": "еєε", "f": "ſ", "h": "һ", "i": "іıιɩ", "k": "кκ", "l": "ӏ"},
    **{"m": "м", "n": "пηɴ", "o": "оοσ", "p": "рρ", "r": "гɼ", "s": "ѕ", "t": "тτ", "u": "υս", "v": "νѵ", "x": "хχ"},
}
_LATIN = str.maketrans({other: letter for letter, others in _LOOK_ALIKES.items() for other in others})

# ChatML, Llama 2 to 4, Mistral, Gemma, DeepSeek and Phi; the judge's own come from its tokenizer.
_CONTROL = (
    r"<[|｜][^<>|｜\s]{1,60}[|｜]>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|<</?SYS>>|</?s>|<(?:bos|eos|pad|unk)>|</?(?:start_of_turn|end_of_turn)>"
)
# Tokens that a tokenizer finds in plain text without calling them special (`<think>`); others are whitespace or words.
_MARKUP = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")

_SCORE = re.compile(STATEMENT, re.IGNORECASE)
_SCORE_HEADING = re.compile(r"(?<=score)([*_`]*[ \t]*)(?=\n[\s*_=`\[($-]*\d)", re.IGNORECASE)
_SOUNDNESS = re.compile(r"(sound(?:ness)?[*_\s]*)[:：](?=[\s*_\[(`\"'“‘]*(?:yes|no))", re.IGNORECASE)
_MARK = re.compile(
    r"(mark[*_\s]*#?\d+[*_]*\s*)[:：](?=[\s*_\[(`\"'“‘]*(?:established|partial|absent|contradicted))", re.IGNORECASE
)


class InjectionGuard:
    """Sanitizes text for one judge (its control tokens, its parser) and one prompt (its tags).

    Args:
        tags: names of the tags around the prompt's data.
        control: matches the control tokens of chat templates (see `control_token_pattern`).
        every_score: whether the parser accepts a `Score:` that no number follows.
        soundness: whether a line `Sound: yes` is part of the verdict.
    """

    def __init__(self, tags: Iterable[str], control: re.Pattern, *, every_score: bool = False, soundness: bool = False):
        self._tags = frozenset(tags) | {"score"}
        self._control = control
        self._every_score = every_score
        self._marks = (_MARK, _SOUNDNESS) if soundness else (_MARK,)

    def __call__(self, text: str) -> str:
        """Sanitize `text`; the function is idempotent."""
        text = _ANGLED.sub(self._neutralized_tag, strip_invisible(text))
        text = self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        text = _SCORE.sub(lambda match: f"{match[0][:-1]} =", text)
        text = _SCORE_HEADING.sub(r"\1 =", text)
        for pattern in self._marks:
            text = pattern.sub(r"\1 =", text)
        return text.replace("Score:", "Score =") if self._every_score else text

    def sanitize_all(self, texts: Sequence[str]) -> list[str]:
        """Sanitize each of `texts`; prefixes of the longest text are not searched again where that one is clean."""
        longest = max(texts, key=len, default="")
        clean = self._clean_prefix_length(longest)
        return [text if len(text) <= clean and longest.startswith(text) else self(text) for text in texts]

    def _clean_prefix_length(self, text: str) -> int:
        """Return a length up to which no prefix of `text` needs a change.

        What is changed in a prefix is also changed in the whole text, at the same position or before it.
        """
        if strip_invisible(text) != text:
            return 0
        tags = (match for match in _ANGLED.finditer(text) if self._neutralized_tag(match) != match[0])
        found = [next(tags, None), *(pattern.search(text) for pattern in (self._control, _SCORE, *self._marks))]
        places = [match.start() for match in found if match]
        if self._every_score and (place := text.find("Score:")) >= 0:
            places.append(place)
        return min(places, default=len(text))

    def _neutralized_tag(self, match: re.Match) -> str:
        return f"[{match['inner']}]" if _folded(match["name"]) in self._tags else match[0]


def strip_invisible(text: str) -> str:
    """Remove invisible characters from `text`, and make every line end a newline."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def control_token_pattern(tokenizer: Any | None) -> re.Pattern:
    """Return a pattern of the control tokens of the usual chat templates and of this tokenizer (None: no tokenizer)."""
    if tokenizer is None:
        return re.compile(_CONTROL)
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or _MARKUP.fullmatch(token.content)}
    names |= set(tokenizer.all_special_tokens)
    own = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, own), _CONTROL]))


class _Visible(dict):
    """A table for str.translate, which computes the replacement of a character when it first occurs."""

    def __missing__(self, code: int) -> int | None:
        replacement: int | None
        if code in _LINE_ENDS:
            replacement = ord("\n")
        elif chr(code) in "\n\t":
            replacement = code
        else:
            replacement = None if unicodedata.category(chr(code)) in _UNSEEN else code
        self[code] = replacement
        return replacement


_VISIBLE = _Visible()


def _folded(name: str) -> str:
    """Return a tag's name in plain lower-case Latin letters, without accents and look-alikes."""
    letters = unicodedata.normalize("NFKD", name).casefold().translate(_LATIN)
    return "".join(letter for letter in letters if not unicodedata.combining(letter))
