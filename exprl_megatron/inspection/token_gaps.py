"""The tokens of a trace on which trainer and sampler differ most."""

from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from exprl_megatron.inspection.rollout_steps import InspectedGroup
from exprl_megatron.reporting.plain_text import escaped_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 20
"""Tokens of a trace."""


def token_gap_table(
    inspected: InspectedGroup, place: int, tokenizer: "PreTrainedTokenizerBase | None"
) -> RenderableType:
    """Return the tokens of the sample at `place` with the largest distances, in nats, in the order of the trace."""
    trace = inspected.group.samples[place].trace
    gap = inspected.gap(place)
    title = f"sample {trace.sample}: log-probs of trainer and sampler"
    if gap is None or not len(gap):
        return Text(f"{title}\nThe trainer's are not known: the trace is out of the loss or empty.")
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title_style = table.caption_style = ""
    table.show_edge = False
    for name in ("token", "text"):
        table.add_column(name, overflow="fold")
    for name in ("sampler", "trainer", "gap"):
        table.add_column(name, justify="right", no_wrap=True)
    distances = np.abs(gap)
    for index in sorted(np.argsort(-distances, kind="stable")[:MOST].tolist()):
        text = "" if tokenizer is None else repr(tokenizer.decode([int(trace.token_ids[index])]))
        sampler = float(trace.log_probs[index])
        numbers = (f"{sampler:.5f}", f"{sampler + float(gap[index]):.5f}", f"{float(gap[index]):+.2e}")
        table.add_row(str(index), escaped_line(text), *numbers)
    mean, largest = distances.mean(), distances.max()
    table.caption = f"{min(MOST, len(gap))} of {len(gap)} tokens, mean {mean:.2e}, max {largest:.2e}"
    return table
