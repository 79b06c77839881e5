"""How many GPUs a test needs, and the table that a run of the GPU tests ends with.

`@pytest.mark.gpus(2)` needs two; every other GPU test needs one. A test for which there are too few is a row of the
table, and a run in which no test had enough fails.
"""

import time
from collections.abc import Iterator

import pytest

from exprl_megatron.utils.accelerator import gpu_count

ROWS = pytest.StashKey[list[tuple[str, str, str, str]]]()
TESTS = pytest.StashKey[set[str]]()
BEGAN = pytest.StashKey[float]()
HEADER = ("what", "measured", "wanted", "")
MOST_S = 480
"""For all tests of one GPU."""


def needed(item: pytest.Item) -> int:
    """GPUs without which the test cannot run; 0 where it is no GPU test."""
    if item.get_closest_marker("gpu") is None:
        return 0
    marker = item.get_closest_marker("gpus")
    return 1 if marker is None else marker.args[0]


def gpus(count: int) -> str:
    """So many GPUs, in words."""
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def pytest_configure(config):
    config.stash[BEGAN] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    wanting = [item for item in items if needed(item)]
    config.stash[TESTS] = {item.nodeid for item in wanting}
    here = gpu_count() if wanting else 0
    for item in wanting:
        if needed(item) > here:
            item.add_marker(pytest.mark.skip(reason=f"needs {gpus(needed(item))}; {here} can be used here"))


@pytest.fixture
def table(request):
    """`table(what, measured, wanted)` adds a row to the table at the end."""
    rows = request.config.stash.setdefault(ROWS, [])
    return lambda what, measured, wanted, verdict="": rows.append((what, str(measured), str(wanted), verdict))


@pytest.fixture
def check(table):
    """`check(compared)` adds a row for each Compared, and fails where one is not as it must be."""

    def check(compared):
        for one in compared:
            table(one.what, one.measured, one.wanted, "" if one.good else "WRONG")
        wrong = [f"{one.what}: {one.measured}, wanted {one.wanted}" for one in compared if not one.good]
        assert not wrong, "; ".join(wrong)

    return check


def pytest_sessionfinish(session):
    if not session.config.stash.get(TESTS, set()) or session.exitstatus != pytest.ExitCode.OK:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not any(_reports(reporter, session.config, outcome) for outcome in ("passed", "failed", "error")):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter, config):
    rows = [*config.stash.get(ROWS, []), *_without_result(terminalreporter, config)]
    if not rows:
        return
    seconds = f"{time.monotonic() - config.stash[BEGAN]:.0f} s"
    rows = [HEADER, *rows, ("all of it", seconds, f"at most {MOST_S} s on one GPU", "")]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    terminalreporter.section("measured on this machine")
    for row in rows:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _reports(terminalreporter, config, outcome: str) -> list:
    """What became of the GPU tests that ended so."""
    tests = config.stash.get(TESTS, set())
    return [report for report in terminalreporter.stats.get(outcome, []) if report.nodeid in tests]


def _without_result(terminalreporter, config) -> Iterator[tuple[str, str, str, str]]:
    """A row for each GPU test that failed, or that could not run here."""
    for outcome in ("failed", "error"):
        for report in _reports(terminalreporter, config, outcome):
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(report.longrepr if crash is None else crash.message).splitlines()[0]
            yield report.nodeid.rpartition("::")[2], reason, "", "FAILED"
    for report in _reports(terminalreporter, config, "skipped"):
        reason, _, here = report.longrepr[-1].removeprefix("Skipped: ").partition("; ")
        yield report.nodeid.rpartition("::")[2], reason, here, ""
