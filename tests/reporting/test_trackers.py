"""Each tracker shows what a run measured, in its own files; one that fails is reported once and left out."""

import json
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from exprl_megatron.reporting.metrics import MetricsWriter
from exprl_megatron.reporting.tags import tag
from exprl_megatron.reporting.trackers import SampleTable, TrackedRun, Trackers, missing_packages

_DEADLINE_S = 600.0
TABLE = SampleTable(
    "prime/traces", ("problem_id", "trace", "score"), (("a", "1 + 1 | <b>2</b>\nso", 0.75), ("b", "?", None))
)


def _run(tmp_path, names, *, resumed_step=0):
    """Steps 1 and 2 with an evaluation of each stage, or step 3 of a resumed run; what was reported of trackers."""
    run, reported = TrackedRun(tmp_path, "tests", "first", {"seed": 3, "policy": {"model": "m"}}, resumed_step), []
    _write(MetricsWriter(tmp_path / "metrics.jsonl", Trackers(names, run, reported.append), resumed_step), resumed_step)
    return reported


def _write(writer, resumed_step):
    if resumed_step:
        writer.write("sparse", 3, {"reward/mean": 0.75, "grad_norm": 2.0})
    else:
        writer.write_evaluation("prime", 0, {"evaluation/pass@1": 0.125})
        writer.write("prime", 1, {"reward/mean": 0.25, "grad_norm": 1.0})
        writer.write_table(1, TABLE)
        writer.write("sparse", 2, {"reward/mean": 0.5, "grad_norm": float("nan")})
        writer.write_evaluation("sparse", 2, {"evaluation/pass@1": 0.375, "evaluation/pass@1/low": 0.25})
    # Longer than a run waits: this machine may be busy.
    writer.close(_DEADLINE_S)


def test_the_stage_is_in_the_tag_ungrouped_names_get_a_group_and_evaluations_are_one_curve():
    assert tag("prime", "reward/mean") == "prime/reward/mean"
    assert tag("prime", "grad_norm") == "prime/update/grad_norm"
    assert tag("prime", "evaluation/pass@1") == tag("sparse", "evaluation/pass@1") == "evaluation/pass@1"


def test_tensorboard_has_curves_of_each_stage_the_config_and_traces_as_text_without_markup(tmp_path):
    assert not _run(tmp_path, ["tensorboard"])
    assert not _run(tmp_path, ["tensorboard"], resumed_step=2)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert points["prime/reward/mean"] == [(1, 0.25)]
    assert points["sparse/reward/mean"] == [(2, 0.5), (3, 0.75)]
    assert points["evaluation/pass@1"] == [(0, 0.125), (2, 0.375)]
    assert "prime/update/grad_norm" in points
    texts = {name: board.Tensors(name) for name in board.Tags()["tensors"]}
    (config,) = texts["config/text_summary"]
    assert b"seed: 3" in config.tensor_proto.string_val[0]
    (traces,) = texts["prime/traces/text_summary"]
    assert traces.step == 1
    assert "| a | 1 + 1 \\| \\<b\\>2\\</b\\> \u23ce so | 0.75 |" in traces.tensor_proto.string_val[0].decode()


def test_wandb_offline_keeps_every_step_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not _run(tmp_path, ["wandb"])
    assert not _run(tmp_path, ["wandb"], resumed_step=2)
    identifier = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    (first,) = tmp_path.glob(f"wandb-former/offline-run-*-{identifier}/run-{identifier}.wandb")
    (second,) = tmp_path.glob(f"wandb/offline-run-*-{identifier}/run-{identifier}.wandb")
    assert [(row["step"], row["evaluation/pass@1"]) for row in _wandb_rows(first) if "evaluation/pass@1" in row] == [
        (0, 0.125),
        (2, 0.375),
    ]
    (table,) = (row for row in _wandb_rows(first) if "prime/traces/path" in row)
    assert (table["step"], table["prime/traces/_type"]) == (1, "table-file")
    kept = json.loads((first.parent / "files" / table["prime/traces/path"]).read_text())
    assert kept["columns"] == list(TABLE.columns) and kept["data"][0] == list(TABLE.rows[0])
    rows = list(_wandb_rows(second))
    assert [(r["step"], r["prime/reward/mean"]) for r in rows if "prime/reward/mean" in r] == [(1, 0.25)]
    assert [(r["step"], r["sparse/reward/mean"]) for r in rows if "sparse/reward/mean" in r] == [(2, 0.5), (3, 0.75)]


def _wandb_rows(path):
    """The history in a file of W&B, whose process may finish it after its client has ended."""
    deadline = time.monotonic() + _DEADLINE_S
    records = list(_wandb_records(path))
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline, f"{path} does not come to its end"
        time.sleep(0.1)
        records = list(_wandb_records(path))
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _wandb_records(path):
    """The records of a file of W&B: a log of LevelDB's form behind a header of 7 bytes, with a message in each record.

    A block of 32 KiB holds pieces with a checksum (4 bytes), a length (2) and a kind (1): whole, first, middle, last.
    """
    from wandb.proto import wandb_internal_pb2

    content, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        message += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def test_mlflow_keeps_every_step_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert not _run(tmp_path, ["mlflow"])
    assert not _run(tmp_path, ["mlflow"], resumed_step=2)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'tests'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")

    def points(name):
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]

    assert points("sparse/reward/mean") == [(2, 0.5), (3, 0.75)]
    assert points("evaluation/pass_at_1") == [(0, 0.125), (2, 0.375)], "MLflow takes no @"
    assert points("evaluation/pass_at_1.low") == [(2, 0.25)], "no name is a folder of another in a file store"
    assert points("sparse/update/grad_norm") == [(3, 2.0)], "not a number"
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "prime/traces/step-000001.json")).read_text())
    assert table["columns"] == list(TABLE.columns) and table["data"][0] == list(TABLE.rows[0])
    assert "seed: 3" in Path(client.download_artifacts(run.info.run_id, "config.yaml")).read_text()


def _trackio_in(directory, monkeypatch):
    import trackio
    from trackio import sqlite_storage, utils

    for module in (trackio, utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", directory)


def test_trackio_keeps_every_step_in_its_database_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    _trackio_in(tmp_path / "trackio", monkeypatch)
    from trackio.sqlite_storage import SQLiteStorage

    assert not _run(tmp_path, ["trackio"])
    assert not _run(tmp_path, ["trackio"], resumed_step=2)
    name = json.loads((tmp_path / "trackers.json").read_text())["trackio"]
    assert SQLiteStorage.get_runs("tests") == [name] and name.startswith("first-")
    logs = SQLiteStorage.get_logs("tests", name)
    points = [(row["step"], row["sparse/reward/mean"]) for row in logs if "sparse/reward/mean" in row]
    assert points == [(2, 0.5), (3, 0.75)]
    assert [(r["step"], r["evaluation/pass@1"]) for r in logs if "evaluation/pass@1" in r] == [(0, 0.125), (2, 0.375)]
    (table,) = (row["prime/traces"] for row in logs if "prime/traces" in row)
    assert [row["trace"] for row in table["_value"]] == [row[1] for row in TABLE.rows]


def test_a_service_that_nobody_reaches_is_reported_once_and_the_others_continue(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (sentence,) = _run(tmp_path, ["mlflow", "tensorboard"])
    assert sentence.startswith("tracker mlflow failed (MlflowException: ")
    assert sentence.endswith("; it is left out, and metrics.jsonl has every step.")
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("sparse/reward/mean")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def _three_attempts(directory, name):
    """A run whose tracker lost steps 4 and 5 to a kill, went on from checkpoints 4 and 6, and ended with step 8."""
    reported = []

    def attempt(resumed, steps, names):
        run = TrackedRun(directory, "tests", "first", {"seed": 3}, resumed)
        writer = MetricsWriter(directory / "metrics.jsonl", Trackers(names, run, reported.append), resumed)
        if not resumed:
            writer.write_evaluation("prime", 0, {"evaluation/pass@1": 0.0})
        for step in steps:
            writer.write("prime", step, {"reward/mean": step / 8, "loss": 1.0})
            writer.write_table(step, TABLE)
            if step % 2 == 0:
                writer.write_evaluation("prime", step, {"evaluation/pass@1": step / 8})
        writer.close(_DEADLINE_S)

    attempt(0, range(1, 4), [name])
    attempt(3, range(4, 6), [])
    attempt(4, range(5, 8), [name])
    attempt(6, range(7, 9), [name])
    assert not reported
    return directory


STEPS = [(step, step / 8) for step in range(1, 9)]
EVALUATIONS = [(step, step / 8) for step in range(0, 9, 2)]
TABLES = [1, 2, 3, 5, 6, 7, 8]


def test_tensorboard_of_a_run_that_was_killed_has_each_step_once(tmp_path):
    board = EventAccumulator(str(_three_attempts(tmp_path, "tensorboard") / "tensorboard")).Reload()
    points = {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert points["prime/reward/mean"] == STEPS
    assert points["evaluation/pass@1"] == EVALUATIONS
    assert [event.step for event in board.Tensors("prime/traces/text_summary")] == TABLES
    assert len(board.Tensors("config/text_summary")) == 1


def test_tensorboard_of_a_run_that_was_killed_before_its_first_step_has_its_config_once(tmp_path):
    for _ in range(2):
        assert not _attempt_without_a_step(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(board.Tensors("config/text_summary")) == 1
    assert [event.step for event in board.Scalars("evaluation/pass@1")] == [0]


def test_a_torn_file_of_tensorboard_loses_no_step(tmp_path):
    _run(tmp_path, ["tensorboard"])
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b"evaluation/pass@1/low") + 4])
    _run(tmp_path, ["tensorboard"], resumed_step=2)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("evaluation/pass@1/low")] == [(2, 0.25)]
    assert [e.step for e in board.Scalars("sparse/reward/mean")] == [2, 3]


def _attempt_without_a_step(directory, name):
    reported, run = [], TrackedRun(directory, "tests", "first", {"seed": 3})
    writer = MetricsWriter(directory / "metrics.jsonl", Trackers([name], run, reported.append))
    writer.write_evaluation("prime", 0, {"evaluation/pass@1": 0.0})
    writer.close(_DEADLINE_S)
    return reported


def test_a_step_of_many_metrics_reaches_mlflow_whole_in_requests_of_at_most_a_thousand():
    from exprl_megatron.reporting import mlflow_tracker

    batches = []
    tracker = object.__new__(mlflow_tracker.MlflowTracker)
    tracker._id, tracker._last = "run", {}
    tracker._client = SimpleNamespace(log_batch=lambda run, metrics: batches.append([each.value for each in metrics]))
    tracker.log(1, {f"stage/group/{number}": float(number) for number in range(2001)})
    assert [len(batch) for batch in batches] == [1000, 1000, 1]
    assert [value for batch in batches for value in batch] == [float(number) for number in range(2001)]


def test_mlflow_of_a_run_that_was_killed_has_each_step_once_in_one_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _three_attempts(tmp_path, "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])

    def points(name):
        return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]

    assert points("prime/reward/mean") == STEPS
    assert points("evaluation/pass_at_1") == EVALUATIONS
    tables = client.list_artifacts(run.info.run_id, "prime/traces")
    assert [Path(table.path).stem for table in tables] == [f"step-{step:06}" for step in TABLES]
    content = json.loads(Path(client.download_artifacts(run.info.run_id, tables[3].path)).read_text())
    assert len(content["data"]) == len(TABLE.rows), "a table that is logged again grows"


def test_mlflow_finds_a_run_whose_process_was_killed_before_it_knew_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert not _attempt_without_a_step(tmp_path, "mlflow")
    ids = json.loads((tmp_path / "trackers.json").read_text())
    (tmp_path / "trackers.json").write_text(json.dumps({name: i for name, i in ids.items() if name != "mlflow"}))
    assert not _attempt_without_a_step(tmp_path, "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    assert len(client.search_runs([client.get_experiment_by_name("tests").experiment_id])) == 1


def test_trackio_of_a_run_that_was_killed_has_each_step_once_in_one_run(tmp_path, monkeypatch):
    _trackio_in(tmp_path / "trackio", monkeypatch)
    _three_attempts(tmp_path, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("tests")
    logs = SQLiteStorage.get_logs("tests", name)
    assert [(row["step"], row["prime/reward/mean"]) for row in logs if "prime/reward/mean" in row] == STEPS
    assert [(r["step"], r["evaluation/pass@1"]) for r in logs if "evaluation/pass@1" in r] == EVALUATIONS
    assert [row["step"] for row in logs if "prime/traces" in row] == TABLES


def test_wandb_offline_of_a_run_that_was_killed_has_each_step_once_in_one_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _three_attempts(tmp_path, "wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = list(_wandb_rows(file))
    assert [(row["step"], row["prime/reward/mean"]) for row in rows if "prime/reward/mean" in row] == STEPS
    assert [(r["step"], r["evaluation/pass@1"]) for r in rows if "evaluation/pass@1" in r] == EVALUATIONS


def test_a_resumed_run_takes_from_a_service_what_it_has(tmp_path):
    """As of W&B online, whose server gives a resumed run its summary."""
    has, logged = {"prime/update/loss": 2, "evaluation/pass@1": 0}, []
    tracker = _Faulty("")
    tracker.last_step = lambda tag: has.get(tag, -1)
    tracker.log = lambda step, values: logged.append((step, values))
    writer = MetricsWriter(tmp_path / "metrics.jsonl", Trackers([], TrackedRun(tmp_path, "p", "n"), print))
    for step in (1, 2, 3):
        writer.write("prime", step, {"loss": step / 2})
        writer.write_evaluation("sparse", step, {"evaluation/pass@1": step / 4})
    writer.close()
    run = TrackedRun(tmp_path, "p", "n", {}, 3)
    MetricsWriter(
        tmp_path / "metrics.jsonl", Trackers(["wandb"], run, print, lambda name, run: tracker), resumed_step=3
    ).close()
    assert logged == [
        (1, {"evaluation/pass@1": 0.25}),
        (2, {"evaluation/pass@1": 0.5}),
        (3, {"prime/update/loss": 1.5, "evaluation/pass@1": 0.75}),
    ]


class _Faulty:
    """Raises in the call of this name."""

    def __init__(self, where):
        self.calls = []
        self._where = where

    def _called(self, name):
        self.calls.append(name)
        if name == self._where:
            raise ConnectionError("gone")

    def last_step(self, tag):
        return -1

    def last_table_step(self, name):
        return -1

    def log(self, step, values):
        self._called("log")

    def log_table(self, step, table):
        self._called("log_table")

    def close(self):
        self._called("close")


@pytest.mark.parametrize(
    ("where", "calls"),
    [("log", ["log"]), ("log_table", ["log", "log_table"]), ("close", ["log", "log_table", "log", "close"])],
)
def test_a_tracker_is_not_called_again_after_it_has_failed(tmp_path, where, calls):
    tracker, told = _Faulty(where), []
    trackers = Trackers(["wandb"], TrackedRun(tmp_path, "p", "n"), told.append, lambda name, run: tracker)
    trackers.log(1, {"a": 1.0})
    trackers.log_table(1, TABLE)
    trackers.log(2, {"a": 1.0})
    trackers.close()
    assert tracker.calls == calls
    assert told == ["tracker wandb failed (ConnectionError: gone); it is left out, and metrics.jsonl has every step."]


@pytest.mark.parametrize("where", ["open", "last_step", "log"])
def test_a_tracker_whose_client_ends_its_process_is_reported_too(tmp_path, where):
    def ends(*_):
        raise SystemExit("no account")

    def open_one(name, run):
        tracker = ends() if where == "open" else _Faulty("")
        setattr(tracker, where, ends)
        return tracker

    told: list[str] = []
    trackers = Trackers(["wandb"], TrackedRun(tmp_path, "p", "n"), told.append, open_one)
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert told == ["tracker wandb failed (SystemExit: no account); it is left out, and metrics.jsonl has every step."]


def test_a_tracker_that_hangs_delays_no_step_and_is_left_behind_at_the_end(tmp_path):
    told, go_on = [], threading.Event()

    def never_opens(name, run):
        go_on.wait()
        return _Faulty("")

    trackers = Trackers(["wandb"], TrackedRun(tmp_path, "p", "n"), told.append, never_opens)
    for step in range(3):
        trackers.log(step, {"a": 1.0})
    trackers.close(deadline_s=0.05)
    go_on.set()
    assert told == [
        "tracker wandb has not taken its last records within 0.05 s; it is left out, and metrics.jsonl has every step."
    ]


def test_records_do_not_pile_up_for_a_tracker_that_hangs(tmp_path):
    told, go_on = [], threading.Event()
    trackers = Trackers(["wandb"], TrackedRun(tmp_path, "p", "n"), told.append, lambda name, run: go_on.wait())
    for step in range(2_000):
        trackers.log(step, {"a": 1.0})
    go_on.set()
    trackers.close()
    assert [sentence.partition(";")[0] for sentence in told] == ["tracker wandb has not taken 1000 records in a row"]


def test_a_tracker_whose_package_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else object())
    (sentence,) = missing_packages(["tensorboard", "mlflow"])
    assert "trackers has mlflow" in sentence and "pip install 'exprl-megatron[mlflow]'" in sentence
