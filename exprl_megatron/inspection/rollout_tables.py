"""A group of the rollout log as a table: a row for each trace, and one for each of its judged segments."""

from rich import box
from rich.table import Table
from rich.text import Text

from exprl_megatron.inspection.rollout_steps import TokenAdvantages, span_advantage
from exprl_megatron.inspection.selection import (
    SelectedGroup,
    group_mean_score,
    has_abstention,
    mean_tokens,
    score_spread,
)
from exprl_megatron.judging.judgement import Abstained, Judgement
from exprl_megatron.reporting.plain_text import escaped_line
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.trace import Trace

HASH_DIGITS = 12


def group_table(selected: SelectedGroup) -> Table:
    """Return the table of groups; docs/show.md describes the columns."""
    table = Table(title=_title(selected), title_justify="left", caption=_caption(selected), caption_justify="left")
    table.box, table.padding, table.show_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    table.title_style = table.caption_style = ""
    for name in ("sample", "score", "verifier"):
        table.add_column(name, overflow="fold")
    for name in ("advantage", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("finish", overflow="fold")
    table.add_column("weights", overflow="fold")
    table.add_column("judgement", no_wrap=True)
    for place in selected.places:
        sample = selected.inspected.group.samples[place]
        advantages = selected.inspected.advantages
        for row in _rows(sample, advantages is not None, None if advantages is None else advantages[place]):
            table.add_row(*row)
    return table


def score_text(judgement: Judgement) -> str:
    """Return the score, or why there is none."""
    return f"abstained: {judgement.reason}" if isinstance(judgement, Abstained) else f"{judgement.value:.3g}"


def finding_text(verified: Judgement | None) -> str:
    """Return the answer verifier's finding as text; empty without one."""
    if verified is None or isinstance(verified, Abstained):
        return "" if verified is None else f"abstained: {verified.reason}"
    return {0.0: "wrong", 1.0: "right"}.get(verified.value, f"{verified.value:.3g}")


def advantage_text(learned: bool, advantages: TokenAdvantages, start: int, end: int) -> str:
    """Return the advantage of a span as text; `out`: the trace is left out of the loss; empty without advantages."""
    value = span_advantage(advantages, start, end)
    if value is not None:
        return f"{value:+.3f}"
    return "out" if learned and advantages is None else ""


def versions_text(trace: Trace) -> str:
    """Return the version of the weights, or each version and the tokens from it."""
    if len(trace.weight_versions) == 1:
        return trace.weight_versions[0][0]
    return ", ".join(f"{version} {start}-{end}" for version, start, end in trace.weight_versions)


def _rows(sample: GradedTrace, learned: bool, advantages: TokenAdvantages) -> list[list[Text]]:
    trace, length = sample.trace, len(sample.trace.token_ids)
    whole = "" if sample.segments else advantage_text(learned, advantages, 0, length)
    first = [str(trace.sample), score_text(sample.judgement), finding_text(sample.verified), whole, str(length)]
    hash_shown = "" if sample.segments else _hash(sample.judgement)
    rows = [[*first, trace.finish_reason, versions_text(trace), hash_shown]]
    for number, segment in enumerate(sample.segments):
        score, span = score_text(segment.judgement), (segment.start, segment.end)
        advantage = advantage_text(learned, advantages, *span)
        tokens = f"{segment.start}-{segment.end}"
        rows.append([f" .{number}", score, "", advantage, tokens, "", "", _hash(segment.judgement)])
    return [[escaped_line(cell) for cell in row] for row in rows]


def _hash(judgement: Judgement) -> str:
    return (judgement.hash or "")[:HASH_DIGITS]


def _title(selected: SelectedGroup) -> Text:
    inspected = selected.inspected
    problem = escaped_line(inspected.group.problem_id, "bold")
    return Text.assemble(f"{inspected.place}, group {inspected.number}: ", problem, f" ({inspected.group.domain})")


def _caption(selected: SelectedGroup) -> str:
    group = selected.inspected.group
    parts = [f"{len(group.samples)} traces"]
    if (mean := group_mean_score(group)) is not None:
        parts += [f"mean score {mean:.3g}", f"spread {score_spread(group):.3g}"]
    if missing := sum(map(has_abstention, group.samples)):
        parts.append(f"{missing} with an abstention")
    return ", ".join([*parts, f"mean length {mean_tokens(group):.0f} tokens"]) + "\n"
