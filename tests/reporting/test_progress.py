"""What a run shows: plain lines in a log file, bars on a terminal."""

import io

import pytest
from rich.console import Console

from exprl_megatron.reporting.progress_bars import StepProgress, duration


def _shown(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    progress = StepProgress(3, console)
    with progress.bar("priming 1", 4) as bar:
        for _ in range(4):
            bar.advance("sampled")
        bar.advance("graded")
    progress.step_done("priming", 1, 2, {"reward/mean": 0.25, "unknown": 1.0}, 30.0)
    progress.step_done("priming", 2, 2, {"reward/mean": 0.5}, 60.0)
    progress.say("[bold] is no markup here")
    return console.file.getvalue()


def test_a_log_file_gets_plain_lines_with_the_time_left():
    lines = [line.partition("] ")[2] for line in _shown(terminal=False).splitlines()]
    assert lines[0] == "priming 1/2 | reward/mean 0.25 | 30.0 s | 1:00 left"
    assert lines[1] == "priming 2/2 | reward/mean 0.5 | 60.0 s | 0:45 left"
    assert lines[2] == "[bold] is no markup here"
    assert len(lines) == 3


def test_a_terminal_gets_bars_as_well():
    text = _shown(terminal=True)
    assert "priming 1 sampled" in text
    assert "4/4" in text
    assert "1/4" in text
    assert "priming 1/2 | reward/mean 0.25" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert duration(seconds) == text
