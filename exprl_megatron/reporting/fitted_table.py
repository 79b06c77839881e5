"""Tables that fit the terminal: one that is too wide is transposed, so that its headings become its first column."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table


def print_table(console: Console, table: Table) -> None:
    """Print `table`; where it is wider than the terminal, transposed, in as many pieces as needed."""
    for piece in fit_table(console, table):
        console.print(piece)


def fit_table(console: Console, table: Table) -> list[Table]:
    """Return `table` alone where it fits; else its records as columns of one or more tables, with its headings on the
    left.

    A single record that is too wide has its cells folded.
    """
    if _width(console, table) <= console.width:
        return [table]
    headings = [str(column.header) for column in table.columns]
    records = list(zip(*(column.cells for column in table.columns), strict=True))
    pieces: list[Table] = []
    first = 0
    while first < len(records):
        count = len(records) - first
        while count > 1 and _width(console, _turned(headings, records[first : first + count])) > console.width:
            count -= 1
        pieces.append(_turned(headings, records[first : first + count]))
        first += count
    if pieces:
        pieces[0].title, pieces[-1].caption = table.title, table.caption
    return pieces


def _turned(headings: list[str], records: list) -> Table:
    turned = Table(Column(headings[0], overflow="fold"))
    for record in records:
        turned.add_column(record[0], justify="right", overflow="fold")
    for place, heading in enumerate(headings[1:], start=1):
        turned.add_row(heading, *(record[place] for record in records))
    return turned


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum
