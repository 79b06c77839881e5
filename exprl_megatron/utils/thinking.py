"""Which part of a model's text is its answer: what follows, or is outside, its thinking blocks.

The formats are those that open models write: `<think>` (Qwen3, DeepSeek-R1, Nemotron, Phi-4), `<thinking>`,
`<thought>` (EXAONE), `<reasoning>`, `<seed:think>` (Seed-OSS), `[THINK]` (Magistral), `◁think▷` (Kimi),
`<|begin_of_thought|>` (OpenThinker), `<|START_THINKING|>` (Command A), `<|channel>thought` (Gemma) and GPT-OSS's
channels, of which only `final` is the answer. Chat templates often open the block in the prompt, so that a text
begins within it and holds the closing tag alone.
"""

import re
from collections.abc import Iterator

_NAME = r"(?:think|thinking|thought|thoughts|reasoning|scratchpad|seed:think)"
_BLOCKS = (
    (rf"<{_NAME}>", rf"</{_NAME}>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|channel>thought", r"<channel\|>"),
)
_TAG_START = re.compile(r"[<\[◁]")
_TAG = re.compile("|".join(f"(?P<open{i}>{tags[0]})|(?P<close{i}>{tags[1]})" for i, tags in enumerate(_BLOCKS)), re.I)
# GPT-OSS: <|start|>assistant<|channel|>analysis<|message|>...<|end|>; the second form is what is left of it where
# the special tokens are not decoded.
_CHANNEL = re.compile(r"<\|channel\|>\s*(?P<name>\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start)\|>")
_BARE_ANALYSIS = re.compile(r"\s*analysis(?=[A-Z\"'`*\\$(\d<\[])")
_BARE_FINAL = re.compile(r"assistant\s*final")


def mask_thinking(text: str) -> str:
    """Return `text` with everything that is not the answer replaced by as many newlines, so that places stay the same.

    A block that is never closed reaches to the end of the text; a closing tag without an opening one ends a block
    that the prompt has opened.
    """
    kept = _channels(text)
    kept = _tagged(text) if kept is None else kept
    if kept == [(0, len(text))]:
        return text
    pieces, place = [], 0
    for start, end in kept:
        pieces += ["\n" * (start - place), text[start:end]]
        place = end
    return "".join([*pieces, "\n" * (len(text) - place)])


def _tags(text: str) -> Iterator[re.Match]:
    """Yield the tags in `text`, which are looked for only where one can begin: so many forms take long at every
    character.
    """
    end = 0
    for start in _TAG_START.finditer(text):
        if start.start() >= end and (tag := _TAG.match(text, start.start())):
            end = tag.end()
            yield tag


def _tagged(text: str) -> list[tuple[int, int]]:
    """Return the spans outside of blocks."""
    kept: list[tuple[int, int]] = []
    start, thinks = 0, False
    for tag in _tags(text):
        if (tag.lastgroup or "").startswith("close"):
            if not thinks:
                # The prompt opened this block: all that came before it is thinking.
                kept = []
            start, thinks = tag.end(), False
        elif not thinks:
            kept.append((start, tag.start()))
            thinks = True
    return kept if thinks else [*kept, (start, len(text))]


def _channels(text: str) -> list[tuple[int, int]] | None:
    """Return the spans of GPT-OSS's channel `final`; None where the text has no channels."""
    messages = list(_CHANNEL.finditer(text))
    if messages:
        spans = []
        for message in messages:
            end = _CHANNEL_END.search(text, message.end())
            if message["name"] == "final":
                spans.append((message.end(), len(text) if end is None else end.start()))
        return spans
    finals = list(_BARE_FINAL.finditer(text)) if text.lstrip().startswith("analysis") else []
    if finals or _BARE_ANALYSIS.match(text):
        return [(finals[-1].end(), len(text))] if finals else []
    return None
