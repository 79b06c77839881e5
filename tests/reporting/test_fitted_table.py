"""A table is at most as wide as the terminal, and loses no cell for it."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from exprl_megatron.reporting.fitted_table import print_table

HEADINGS = ("stage", "requests", "not guarded", "traces with overlap", "of the reference", "by chance")


def _printed(width, records):
    table = Table(*HEADINGS, title="saved rollouts", caption="what it says below")
    for number in range(records):
        table.add_row(f"stage-{number}", *(f"{number}{place}" for place in range(5)))
    console = Console(file=io.StringIO(), width=width)
    print_table(console, table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 40, 34])
@pytest.mark.parametrize("records", [1, 2, 9])
def test_every_heading_and_cell_is_printed_whole(width, records):
    text = _printed(width, records)
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text
    assert text.count("saved rollouts") == text.count("what it says below") == 1
    cells = [f"{n}{place}" for n in range(records) for place in range(5)]
    for word in (*HEADINGS, *(f"stage-{n}" for n in range(records)), *cells):
        assert word in text


def test_a_table_that_fits_is_left_as_it_is():
    first = _printed(200, 2).splitlines()[2]
    assert [cell.strip() for cell in first.strip("\u2503").split("\u2503")] == list(HEADINGS)
