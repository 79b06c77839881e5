"""A trace's text with the boundaries of its segments."""

from collections.abc import Callable
from functools import cache

from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exprl_megatron.inspection.rollout_tables import advantage_text, finding_text, score_text
from exprl_megatron.judging.token_text import TokenText
from exprl_megatron.reporting.plain_text import plain, plain_line
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.training.train_samples import TokenAdvantages

Boundaries = Callable[[GradedTrace], list[int] | None]
"""Of a trace with segments: the characters of its text at which they begin; None where that is not known."""


def trace_panels(
    sample: GradedTrace, learned: bool, advantages: TokenAdvantages, boundaries: Boundaries
) -> RenderableType:
    """The text, with a line before each segment, and the words of the judge and of the verifier."""
    panels = [_panel(f"sample {sample.trace.sample}", _body(sample, learned, advantages, boundaries))]
    if not sample.segments and sample.judgement.evidence:
        panels.append(_panel(f"judgement: {score_text(sample.judgement)}", plain(sample.judgement.evidence)))
    for number, segment in enumerate(sample.segments):
        if segment.judgement.evidence:
            title = f"judgement .{number}: {score_text(segment.judgement)}"
            panels.append(_panel(title, plain(segment.judgement.evidence)))
    if sample.verified is not None and sample.verified.evidence:
        panels.append(_panel(f"verifier: {finding_text(sample.verified)}", plain(sample.verified.evidence)))
    return Renderables(*panels)


def boundaries_by(model: str) -> Boundaries:
    """By the tokenizer of the policy, which is loaded where it is needed."""

    @cache
    def tokenizer() -> PreTrainedTokenizerBase | None:
        try:
            return AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, KeyError):
            return None

    def boundaries(sample: GradedTrace) -> list[int] | None:
        if (found := tokenizer()) is None:
            return None
        text = TokenText(sample.trace.token_ids, found)
        # Another tokenizer than that of the run would cut elsewhere.
        if text.text != sample.trace.text:
            return None
        return [text.characters_before(segment.start) for segment in sample.segments]

    return boundaries


def _body(sample: GradedTrace, learned: bool, advantages: TokenAdvantages, boundaries: Boundaries) -> Text:
    text = sample.trace.text
    if not sample.segments:
        return plain(text)
    if (starts := boundaries(sample)) is None:
        note = "The policy's tokenizer does not give this text, so that its segments are not marked.\n"
        return Text.assemble((note, "italic"), plain(text))
    body = Text()
    ends = [*starts[1:], len(text)]
    for number, (segment, start, end) in enumerate(zip(sample.segments, starts, ends, strict=True)):
        advantage = advantage_text(learned, advantages, segment.start, segment.end)
        heading = f".{number}  tokens {segment.start}-{segment.end}  score {score_text(segment.judgement)}"
        heading += f"  advantage {advantage}" if advantage else ""
        body.append("\n" if number else "").append(plain_line(heading, "bold reverse")).append("\n")
        body.append(plain(text[start:end]))
    return body


def _panel(title: str, text: Text) -> Panel:
    return Panel(text, title=plain_line(title), title_align="left")
