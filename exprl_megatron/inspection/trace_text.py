"""A trace's text with the boundaries of its segments."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.panel import Panel
from rich.text import Text

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.rollout_steps import TokenAdvantages
from exprl_megatron.inspection.rollout_tables import advantage_text, finding_text, score_text
from exprl_megatron.judging.token_text import TokenText
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.reporting.plain_text import escaped_line, escaped_text
from exprl_megatron.rollout.group import GradedTrace, RewardTerm
from exprl_megatron.rollout.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Boundaries = Callable[[GradedTrace], list[int] | None]
"""Of a trace with segments: the characters of its text at which they begin; None where that is not known."""


def trace_panels(
    sample: GradedTrace, learned: bool, advantages: TokenAdvantages, boundaries: Boundaries
) -> RenderableType:
    """Return the text, with a line before each segment, the words of judge and verifier, and the terms of the
    reward.
    """
    panels = [_panel(f"sample {sample.trace.sample}", _body(sample, learned, advantages, boundaries))]
    if not sample.segments and sample.judgement.evidence:
        panels.append(_panel(f"judgement: {score_text(sample.judgement)}", escaped_text(sample.judgement.evidence)))
    for number, segment in enumerate(sample.segments):
        if segment.judgement.evidence:
            title = f"judgement .{number}: {score_text(segment.judgement)}"
            panels.append(_panel(title, escaped_text(segment.judgement.evidence)))
    if sample.verified is not None and sample.verified.evidence:
        panels.append(_panel(f"verifier: {finding_text(sample.verified)}", escaped_text(sample.verified.evidence)))
    if sample.terms:
        total = "none" if sample.reward is None else f"{sample.reward:.3g}"
        panels.append(_panel(f"reward: {total}", escaped_text("\n".join(map(_term_line, sample.terms)))))
    return Renderables(*panels)


def _term_line(term: RewardTerm) -> str:
    value = "abstained" if term.value is None else f"{term.value:.3g}"
    return f"{term.weight:g} x {term.name} {value}" + (f"  ({term.evidence})" if term.evidence else "")


class PolicyTokenizer:
    """The tokenizer of a run's policy, loaded where it is first needed; a run can be read without it."""

    def __init__(self, model: str):
        self._model = model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer; None where it no longer exists."""
        path = Path(self._model).expanduser()
        if path.is_absolute() and not path.exists():
            return None  # without importing transformers, which takes seconds
        try:
            return load_tokenizer(self._model)
        except UserError:
            return None

    def characters_before(self, trace: Trace) -> Callable[[int], int] | None:
        """Return a function from a number of tokens to the characters of text that they give; None where unknown."""
        if self.tokenizer is None:
            return None
        text = TokenText(trace.token_ids, self.tokenizer)
        lead = len(trace.text) - len(text.text)
        # Another tokenizer than that of the run would cut elsewhere. A server decodes the response behind its prompt,
        # so that the first word may have a space before it.
        if lead < 0 or trace.text[:lead].strip() or trace.text[lead:] != text.text:
            return None
        return lambda tokens: lead + text.characters_before(tokens) if tokens else 0

    def boundaries(self, sample: GradedTrace) -> list[int] | None:
        """Return the characters of a trace's text at which its segments begin; None where that is not known."""
        before = self.characters_before(sample.trace)
        return None if before is None else [before(segment.start) for segment in sample.segments]


def _body(sample: GradedTrace, learned: bool, advantages: TokenAdvantages, boundaries: Boundaries) -> Text:
    text = sample.trace.text
    if not sample.segments:
        return escaped_text(text)
    if (starts := boundaries(sample)) is None:
        note = "The policy's tokenizer does not give this text, so that its segments are not marked.\n"
        return Text.assemble((note, "italic"), escaped_text(text))
    body = Text()
    ends = [*starts[1:], len(text)]
    for number, (segment, start, end) in enumerate(zip(sample.segments, starts, ends, strict=True)):
        advantage = advantage_text(learned, advantages, segment.start, segment.end)
        heading = f".{number}  tokens {segment.start}-{segment.end}  score {score_text(segment.judgement)}"
        heading += f"  advantage {advantage}" if advantage else ""
        body.append("\n" if number else "").append(escaped_line(heading, "bold reverse")).append("\n")
        body.append(escaped_text(text[start:end]))
    return body


def _panel(title: str, text: Text) -> Panel:
    return Panel(text, title=escaped_line(title), title_align="left")
