"""metrics.jsonl and TensorBoard hold each step once, whatever interrupted the run."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from exprl_megatron.errors import UserError
from exprl_megatron.reporting.metrics import MetricsWriter, read_metrics
from exprl_megatron.reporting.trackers import TrackedRun, Trackers


def _writer(tmp_path, resumed_step=0):
    run = TrackedRun(tmp_path, "tests", "run", {}, resumed_step)
    return MetricsWriter(tmp_path / "metrics.jsonl", Trackers(["tensorboard"], run, pytest.fail), resumed_step)


def _write(tmp_path, steps, resumed_step=0, offset=0.0):
    with _writer(tmp_path, resumed_step) as writer:
        for step in steps:
            writer.write("priming", step, {"loss": step + offset, "reward/mean": 0.5})


def test_a_step_is_a_record_and_a_point(tmp_path):
    _write(tmp_path, [1, 2])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["stage"], r["step"], r["metrics"]) for r in records] == [
        ("priming", 1, {"loss": 1.0, "reward/mean": 0.5}),
        ("priming", 2, {"loss": 2.0, "reward/mean": 0.5}),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("priming/update/loss")] == [(1, 1.0), (2, 2.0)]


def test_after_a_resume_no_step_is_there_twice(tmp_path):
    _write(tmp_path, [1, 2, 3, 4])
    _write(tmp_path, [3, 4, 5], resumed_step=2, offset=0.25)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["metrics"]["loss"]) for r in records] == [(1, 1), (2, 2), (3, 3.25), (4, 4.25), (5, 5.25)]
    seconds = [r["wall_s"] for r in records]
    assert seconds == sorted(seconds)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("priming/update/loss")] == [
        (1, 1),
        (2, 2),
        (3, 3.25),
        (4, 4.25),
        (5, 5.25),
    ]


def test_an_evaluation_is_in_the_record_and_at_the_point_of_its_step_once(tmp_path):
    with _writer(tmp_path) as writer:
        writer.write_evaluation("priming", 0, {"evaluation/pass@1": 0.1})
        for step in (1, 2):
            writer.write("priming", step, {"loss": float(step)})
        writer.write_evaluation("priming", 2, {"evaluation/pass@1": 0.3})
        writer.write_evaluation("priming", 2, {"evaluation/pass@1": 0.9})
    with _writer(tmp_path, resumed_step=2) as writer:
        writer.write_evaluation("priming", 0, {"evaluation/pass@1": 0.9})
        writer.write_evaluation("priming", 2, {"evaluation/pass@1": 0.9})
        writer.write("priming", 3, {"loss": 3.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["metrics"]) for r in records] == [
        (0, {"evaluation/pass@1": 0.1}),
        (1, {"loss": 1.0}),
        (2, {"loss": 2.0, "evaluation/pass@1": 0.3}),
        (3, {"loss": 3.0}),
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(e.step, round(e.value, 3)) for e in board.Scalars("evaluation/pass@1")]
    assert points == [(0, 0.1), (2, 0.3)]


def test_an_evaluation_behind_the_resumed_step_is_recorded_again(tmp_path):
    _write(tmp_path, [1, 2])
    with _writer(tmp_path, resumed_step=2) as writer:
        writer.write_evaluation("priming", 2, {"evaluation/pass@1": 0.3})
    with _writer(tmp_path, resumed_step=1) as writer:
        writer.write("priming", 2, {"loss": 2.5})
        writer.write_evaluation("priming", 2, {"evaluation/pass@1": 0.4})
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["metrics"] == {"loss": 2.5, "evaluation/pass@1": 0.4}


def test_a_last_line_cut_off_by_a_crash_is_dropped(tmp_path):
    _write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    _write(tmp_path, [3], resumed_step=2)
    assert [r["step"] for r in read_metrics(path)] == [1, 3]


GOOD = '{"stage": "a", "step": 1, "wall_s": 1.0, "metrics": {}}'


@pytest.mark.parametrize("line", ['{"step"', "[]", '{"step": 2, "metrics": {}}', GOOD.replace("{}", "1")])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
        _writer(tmp_path)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with _writer(tmp_path) as writer:
        writer.write("priming", 1, {"loss": float("nan"), "grad_norm": float("inf")})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"] == {"loss": None, "grad_norm": None}


def test_metrics_of_an_earlier_version_are_read_under_their_new_names(tmp_path):
    jsonl = tmp_path / "metrics.jsonl"
    earlier = {
        "sync/quantise": 0.5,
        "kl/start": 0.25,
        "kept/tokens": 8.0,
        "kept/sequences": 2.0,
        "own/own/x": 1.0,
        "down/own/x": 3.0,
    }
    jsonl.write_text(json.dumps({"stage": "s", "step": 1, "wall_s": 1.0, "metrics": earlier}) + "\n")
    assert read_metrics(jsonl)[0]["metrics"] == {
        "sync/quantize": 0.5,
        "kl/ref": 0.25,
        "accepted/tokens": 8.0,
        "accepted/sequences": 2.0,
        "custom/own/x": 1.0,
        "down/own/x": 3.0,
    }


def test_a_resumed_run_s_seconds_continue_from_the_last_record_that_is_kept(tmp_path):
    jsonl = tmp_path / "metrics.jsonl"
    records = [{"stage": "s", "step": step, "wall_s": 1000.0 * step, "metrics": {"loss": 1.0}} for step in (1, 2, 3)]
    jsonl.write_text("".join(json.dumps(record) + "\n" for record in records))
    _write(tmp_path, [3], resumed_step=2)
    assert [record["wall_s"] // 1000 for record in read_metrics(jsonl)] == [1, 2, 2]
