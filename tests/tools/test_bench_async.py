"""tools/bench_async.py: what it runs, and what it makes of the steps of its runs."""

import json

import bench_async
import pytest


def _records(seconds, staleness):
    """Steps that take `seconds`."""
    metrics = {
        "seconds/sample_and_grade": 0.5,
        "seconds/train": 0.25,
        "length/mean": 10.0,
        "length/max": 60,
        "correction/effective": 0.9,
        "staleness/mean": staleness,
    }
    return [{"step": step, "metrics": metrics | {"seconds/step": s}} for step, s in enumerate(seconds, start=1)]


def test_figures_count_every_step_since_those_ahead_are_paid_for_early():
    found = bench_async.figures(_records([9.0, 5.0, 2.0, 4.0, 3.0, 1.0], 0.8))
    assert (found["step_s"], found["wait_s"], found["train_s"], found["sync_s"]) == (4.0, 0.5, 0.25, 0.0)
    assert (found["staleness_mean"], found["effective"]) == (pytest.approx(0.8), pytest.approx(0.9))


def test_the_table_compares_every_staleness_with_the_first():
    ends = {"before": 0.1, "after": 0.7}
    found = {n: [bench_async.figures(_records([s] * 6, n / 2)) | ends] * 2 for n, s in ((0, 4.0), (4, 3.0))}
    head, _, strict, ahead, _, lengths = bench_async.table(found).splitlines()
    assert [cell.strip() for cell in strict.split("|")[1:4]] == ["0", "4.00", "1.00"]
    assert [cell.strip() for cell in ahead.split("|")[1:4]] == ["4", "3.00", "0.75"]
    assert ahead.endswith("| 0.100 | 0.700, 0.700 |")
    assert head.count("|") == ahead.count("|")
    assert "up to 60" in lengths


def test_its_problems_have_a_long_tail_and_its_runs_differ_in_staleness_alone(tmp_path):
    bench_async.write_problems(tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    steps = sorted(row["problem"].count(" s") for row in rows)
    assert steps[len(steps) // 2] == 1 and steps[-1] == 7
    files = tmp_path / "p.jsonl", tmp_path / "held_out.jsonl"
    one, two = (bench_async.run_config(tmp_path / "r", *files, n, 20, 0) for n in (0, 4))
    assert one.stages[0] == two.stages[0].model_copy(update={"max_staleness": 0})
    assert one.model_copy(update={"stages": two.stages}) == two


def test_too_few_steps_to_fill_the_pipeline_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_async.main(["--steps", "5"])
    assert "--steps is 5; give at least 6" in capsys.readouterr().err
