"""What a run shows: plain lines in a log file, bars on a terminal."""

import io
import time
from datetime import datetime

import pytest
from rich.console import Console

from exprl_megatron.reporting.progress_bars import StepProgress
from exprl_megatron.reporting.run_log import RunLog, duration
from exprl_megatron.reporting.step_line import WIDTH


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
    assert lines[0] == "priming 1/2  reward 0.25  30.0 s, 1:00 left"
    assert lines[1] == "priming 2/2  reward 0.5  60.0 s, 0:45 left"
    assert lines[2] == "[bold] is no markup here"
    assert len(lines) == 3


def test_a_terminal_gets_bars_as_well():
    text = _shown(terminal=True)
    assert "priming 1 sampled" in text
    assert "4/4" in text
    assert "1/4" in text
    assert "priming 1/2  reward 0.25" in text


def test_work_beside_other_work_has_no_bars():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = StepProgress(1, console)
    with progress.bar("learning", 2) as bar:
        bar.advance("done")
        with progress.bar("sampling ahead", 2) as beside:
            beside.advance("sampled")
        bar.advance("done")
    with progress.bar("evaluation", 1) as bar:
        bar.advance("sampled")
    text = console.file.getvalue()
    assert "learning done" in text and "evaluation sampled" in text
    assert "sampling ahead" not in text


JUDGED = {
    "reward/mean": 0.8534,
    "verifier/right": 0.0,
    "loss": -0.36,
    "reward/abstained": 0.007812,
    "length/overlong": 0.0156,
    "sampler_gap/mean": 1.2345e-06,
    "kl/ref": 1.23e-3,
    "length/mean": 1432.7,
    "entropy": 0.512,
    "grad_norm": 0.5231,
}


def _lines(stage, steps, metrics, log=None):
    console = Console(file=io.StringIO(), width=80)
    progress = StepProgress(100, console, log, started=time.time() - 99 * 3600)
    progress.step_done(stage, steps, steps, metrics, 1234.5)
    return console.file.getvalue().splitlines()


def test_the_verifier_s_share_is_right_beside_the_reward_and_a_loss_is_shown_where_there_is_no_reward():
    (line,) = _lines("prime", 12, JUDGED)
    assert "prime 12/12  reward 0.853 right 0%  overlong 1.6%  gap 1.2e-6  " in line
    assert "loss" not in line
    (line,) = _lines("sft", 3, {"loss": 1.25, "entropy": 0.5})
    assert "sft 3/3  loss 1.25  entropy 0.5  1234 s, " in line


@pytest.mark.parametrize("stage", ["p", "prime", "a-stage-with-a-long-name-that-fills-the-line"])
def test_a_step_s_line_has_at_most_a_hundred_columns_and_loses_the_least_important_first(stage):
    (line,) = _lines(stage, 123_456, JUDGED)
    assert len(line) <= WIDTH == 100
    assert "reward 0.853 right 0%  " in line
    assert line.endswith(" left")


def test_lines_are_on_disk_with_the_time_of_day_and_count_from_the_start_of_the_command(tmp_path, monkeypatch):
    log, now = tmp_path / "run.log", time.time()
    monkeypatch.setattr("exprl_megatron.reporting.run_log.time.time", lambda: now)
    launcher = RunLog(now - 61, show=lambda line: None)
    launcher.say("before there is a directory")
    launcher.keep(log)
    launcher.say("policy-0 is ready after 12.0 s")
    (shown,) = _lines("prime", 1, JUDGED, log)
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert [text for _, text in lines] == [
        "[1:01] before there is a directory",
        "[1:01] policy-0 is ready after 12.0 s",
        shown,
    ]
    assert all(datetime.fromisoformat(day).tzinfo for day, _ in lines)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert duration(seconds) == text
