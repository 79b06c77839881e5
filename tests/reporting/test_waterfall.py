"""What a step's seconds go to: phases that add up, and the one that holds the others up."""

import json
from dataclasses import replace

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.run_waterfall import show_waterfall
from exprl_megatron.reporting.timeline import Span, Timeline, read_timeline
from exprl_megatron.reporting.waterfall import bars, bottleneck, draw_timeline, mean_phases, stage_phases, step_times


def _step(number, start, *, sampled, graded, rollouts, train, end, save=0.0):
    """A step that waits for its rollouts until `rollouts`, trains until `train`, and is over at `end`."""
    spans = [
        Span("prime", number, "sampling", sampled[0], sampled[1]),
        Span("prime", number, "grading", graded[0], graded[1]),
        Span("prime", number, "sample_and_grade", start, rollouts),
        Span("prime", number, "train", rollouts, train),
        Span("prime", number, "step", start, end),
    ]
    return spans + ([Span("prime", number, "save", end, end + save)] if save else [])


def test_the_wait_is_sampling_s_while_traces_are_written_and_grading_s_after_that():
    spans = _step(1, 0.0, sampled=(0.0, 6.0), graded=(2.0, 9.0), rollouts=9.0, train=12.0, end=13.0, save=2.0)
    (time,) = step_times(spans)
    assert time.phases == {
        "sync": 0.0,
        "sampling": 6.0,
        "grading": 3.0,
        "log_probs": 0.0,
        "train": 3.0,
        "save": 2.0,
        "other": 1.0,
    }
    assert time.seconds == 15.0
    assert bottleneck(time.phases).startswith("sampling is the bottleneck, 40% of a step; what helps: more sampling")


def test_rollouts_that_were_made_ahead_hold_no_step_up():
    # Sampled and graded while the step before was learned.
    spans = _step(2, 20.0, sampled=(3.0, 15.0), graded=(5.0, 21.0), rollouts=21.0, train=29.0, end=29.0)
    (time,) = step_times(spans)
    assert time.phases["sampling"] == 0.0 and time.phases["grading"] == 1.0
    assert bottleneck(time.phases).startswith("train is the bottleneck, 89% of a step")


def test_of_a_step_that_was_done_again_the_last_time_counts():
    lost = _step(1, 0.0, sampled=(0.0, 50.0), graded=(1.0, 50.0), rollouts=50.0, train=60.0, end=60.0)
    again = _step(1, 100.0, sampled=(100.0, 101.0), graded=(100.5, 102.0), rollouts=102.0, train=104.0, end=104.0)
    (time,) = step_times(lost + again)
    assert (time.phases["sampling"], time.phases["grading"], time.seconds) == (1.0, 1.0, 4.0)


def test_a_checkpoint_of_a_lost_attempt_is_not_the_step_s():
    lost = _step(1, 0.0, sampled=(0.0, 1.0), graded=(0.5, 1.0), rollouts=1.0, train=2.0, end=2.0, save=5.0)
    again = _step(1, 100.0, sampled=(100.0, 101.0), graded=(100.5, 101.0), rollouts=101.0, train=104.0, end=104.0)
    (time,) = step_times(lost + again)
    assert time.phases["save"] == 0.0


def test_a_step_that_is_not_over_does_not_count():
    spans = _step(1, 0.0, sampled=(0.0, 1.0), graded=(0.5, 1.0), rollouts=1.0, train=2.0, end=2.0)
    spans.append(Span("prime", 2, "sampling", 2.0, 3.0))
    assert [time.step for time in step_times(spans)] == [1]
    assert mean_phases(step_times(spans)) == stage_phases(spans)["prime"]


def test_a_run_s_waterfall_is_printed_drawn_and_given_to_machines(tmp_path, capsys):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    for span in _step(1, 0.0, sampled=(0.0, 6.0), graded=(2.0, 9.0), rollouts=9.0, train=12.0, end=13.0):
        timeline.add(span)
    timeline.close()
    with open(tmp_path / "timeline.jsonl", "a") as file:
        file.write('{"stage": "pri')  # cut off by a crash
    resumed = Timeline(tmp_path / "timeline.jsonl")
    resumed.add(Span("prime", 2, "sampling", 13.0, 14.0))
    resumed.close()
    assert read_timeline(tmp_path / "timeline.jsonl")[-1] == Span("prime", 2, "sampling", 13.0, 14.0)
    with open(tmp_path / "timeline.jsonl", "a") as file:
        file.write('{"stage": "pri')
    show_waterfall(tmp_path, None, 20, tmp_path / "steps.svg", json=False)
    shown = capsys.readouterr().out
    assert "prime, steps 1 to 1" in shown and "sampling is the bottleneck, 46% of a step" in shown
    assert "grading" in (tmp_path / "steps.svg").read_text()
    assert "--stage" not in shown
    show_waterfall(tmp_path, "prime", 1, None, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["mean"]["sampling"] == 6.0 and told["steps"][0]["step"] == 1
    with pytest.raises(UserError, match=r"no finished step of stage sparse; it has steps of prime"):
        show_waterfall(tmp_path, "sparse", 20, None, json=False)


def test_a_waterfall_says_which_stage_it_shows_where_there_are_others(tmp_path, capsys):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    for span in _step(1, 0.0, sampled=(0.0, 6.0), graded=(2.0, 9.0), rollouts=9.0, train=12.0, end=13.0):
        timeline.add(span)
        timeline.add(replace(span, stage="sparse", start=span.start + 20, end=span.end + 20))
    timeline.close()
    show_waterfall(tmp_path, None, 20, None, json=False)
    shown = capsys.readouterr().out
    assert "sparse, steps 1 to 1" in shown and "This is stage sparse; --stage shows prime." in shown


@pytest.mark.parametrize(
    "line", ['{"stage": 1}', "[]", '{"stage": "a", "step": 1, "name": "train", "start": NaN, "end": 1.0}']
)
def test_a_damaged_timeline_is_refused(tmp_path, line):
    (tmp_path / "timeline.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"timeline\.jsonl line 1 is damaged"):
        read_timeline(tmp_path / "timeline.jsonl")
    with pytest.raises(UserError, match="name the directory of a run"):
        read_timeline(tmp_path / "none.jsonl")


def test_lanes_are_drawn_for_trainer_sampling_and_grading(tmp_path):
    spans = _step(1, 0.0, sampled=(0.0, 6.0), graded=(2.0, 9.0), rollouts=9.0, train=12.0, end=13.0)
    draw_timeline(spans, "a step", tmp_path / "new" / "steps.png")
    assert (tmp_path / "new" / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_grading_that_is_drawn_as_waited_for_is_that_of_the_table():
    spans = _step(1, 0.0, sampled=(0.0, 6.0), graded=(2.0, 9.0), rollouts=9.0, train=12.0, end=13.0)
    grading = [bar for bar in bars(spans) if bar.name == "grading"]
    assert [(bar.waited_for, bar.ranges) for bar in grading] == [(False, [(2.0, 9.0)]), (True, [(6.0, 9.0)])]
    assert mean_phases(step_times(spans))["grading"] == 3.0
    assert {bar.name: bar.lane for bar in bars(spans)} == {"grading": 0, "sampling": 1, "train": 2}


def test_the_last_steps_of_a_stage_are_those_that_are_averaged(tmp_path, capsys):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    for number in (1, 2, 3):
        at = 20.0 * number
        times = {"sampled": (at, at + number), "graded": (at, at + number), "rollouts": at + number}
        for span in _step(number, at, **times, train=at + 10.0, end=at + 10.0):
            timeline.add(span)
    timeline.close()
    show_waterfall(tmp_path, None, 2, None, json=True)
    told = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in told["steps"]] == [2, 3]
    assert told["mean"]["sampling"] == pytest.approx(2.5)
