"""The table that a run of the GPU tests ends with."""

from collections.abc import Iterator

import pytest

ROWS = pytest.StashKey[list[tuple[str, str, str]]]()
HEADER = ("what", "measured", "wanted")


@pytest.fixture
def table(request):
    """`table(what, measured, wanted)` adds a row to the table at the end."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda what, measured, wanted: rows.append((what, str(measured), str(wanted)))


def pytest_terminal_summary(terminalreporter, config):
    rows = [*config.stash.get(ROWS, []), *_without_result(terminalreporter)]
    if not rows:
        return
    rows = [HEADER, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    terminalreporter.section("measured on this machine")
    for row in rows:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _without_result(terminalreporter) -> Iterator[tuple[str, str, str]]:
    """A row for each GPU test that failed or was skipped, with the reason."""
    for outcome in ("failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            # A file that cannot be collected has a report without keywords.
            if "gpu" in getattr(report, "keywords", ()):
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = crash.message if crash is not None else report.longrepr[-1]
                yield report.nodeid.rpartition("::")[2], outcome.upper(), reason.splitlines()[0]
