"""The table that a run of the GPU tests ends with."""

import pytest

ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def table(request):
    """`table(what, measured, wanted)` adds a row to the table at the end."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda what, measured, wanted: rows.append((what, str(measured), str(wanted)))


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    rows = [("what", "measured", "wanted"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    terminalreporter.section("measured on this machine")
    for row in rows:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
