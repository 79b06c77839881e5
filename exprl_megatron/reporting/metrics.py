"""A run's metrics: one JSON object a step in metrics.jsonl, and the same in every tracker.

An evaluation of the weights after a step is one more object with that step's number (0: before the first step). Its
tags in a tracker have the stage in front (reporting/tags.py); in metrics.jsonl it is a field of the record.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.reporting.tags import EVALUATION, tag
from exprl_megatron.reporting.trackers import SampleTable, Trackers

RENAMED_METRICS = {
    "sync/quantise": "sync/quantize",
    "kl/start": "kl/ref",
    "kept/tokens": "accepted/tokens",
    "kept/sequences": "accepted/sequences",
}
"""From a name in the metrics.jsonl of an earlier version to today's."""
RENAMED_PREFIXES = {"own/": "custom/"}
"""The same for all metrics whose names begin so."""


class MetricsWriter:
    """Appends to `jsonl` and passes on to `trackers`; one process alone may hold it.

    `resumed_step` is the last step that the resumed run has behind it (0 for a new run), counted over
    all stages. Records of later steps, written before the interruption, are taken out, so that
    no step is there twice; the others are passed on again, for trackers that have not received them.
    Raises UserError where `jsonl` is damaged anywhere but in its last line.
    """

    def __init__(self, jsonl: Path, trackers: Trackers, resumed_step: int = 0):
        jsonl.parent.mkdir(parents=True, exist_ok=True)
        kept = _truncate(jsonl, resumed_step)
        # Seconds continue from the interrupted run's: they are time spent on the run, not the time of day.
        self._evaluated = {record["step"] for record in kept if _is_evaluated(record)}
        self._started = time.monotonic() - (kept[-1]["wall_s"] if kept else 0.0)
        self._file = open(jsonl, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the writer is
        self._trackers = trackers
        if kept:
            trackers.log_all([(record["step"], _tagged(record)) for record in kept])

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step; `step` counts over all stages, from 1. In metrics.jsonl when this returns.

        A number that is not finite becomes null there, which has no other word for it.
        """
        record = {
            "stage": stage,
            "step": step,
            "wall_s": round(time.monotonic() - self._started, 3),
            "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        }
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._trackers.log(step, {tag(stage, name): value for name, value in metrics.items()})

    def write_table(self, step: int, table: SampleTable) -> None:
        """Pass a table of traces on to the trackers."""
        self._trackers.log_table(step, table)

    def write_evaluation(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the evaluation of the weights after `step`, unless it is recorded; names begin with EVALUATION."""
        if step not in self._evaluated:
            self._evaluated.add(step)
            self.write(stage, step, metrics)

    def close(self, deadline_s: float | None = None) -> None:
        """Close the file and the trackers, which have `deadline_s` seconds for it (None: as long as they have)."""
        self._file.close()
        self._trackers.close(*([] if deadline_s is None else [deadline_s]))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(jsonl: Path) -> list[dict]:
    """Return one record for each step in metrics.jsonl, in order; a last line cut off by a crash is left out.

    An evaluation's metrics are in the record of its step; the one before the first step is a record of step 0.

    Raises:
        UserError: any other line is damaged.
    """
    if not jsonl.is_file():
        return []
    lines = jsonl.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(_record(line))
        except ValueError as error:
            raise UserError(f"{jsonl} line {number} is damaged ({error}); delete that line.") from error
    return _by_step([_with_new_names(record) for record in records])


def _record(line: bytes) -> dict:
    """Return the record of a line; NaN and Infinity, which other writers may have written, become null."""
    record = json.loads(line, parse_constant=lambda _: None)
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise ValueError("it is not the record of a step")
    if missing := {"stage", "step", "wall_s"} - record.keys():
        raise ValueError(f"it has no {min(missing)}")
    return record


def _with_new_names(record: dict) -> dict:
    return record | {"metrics": {_new_name(name): value for name, value in record["metrics"].items()}}


def _new_name(name: str) -> str:
    for former, prefix in RENAMED_PREFIXES.items():
        if name.startswith(former):
            return prefix + name.removeprefix(former)
    return RENAMED_METRICS.get(name, name)


def _by_step(records: list[dict]) -> list[dict]:
    """Return the records in the order of their steps, those of the same step as one, with the stage of the step
    itself.
    """
    found: dict[int, dict] = {}
    for record in records:
        former = found.get(record["step"], record)
        stage = (former if _is_evaluated(record) else record)["stage"]
        found[record["step"]] = record | {"stage": stage, "metrics": former["metrics"] | record["metrics"]}
    return [found[step] for step in sorted(found)]


def _tagged(record: dict) -> dict[str, float]:
    """Return the metrics of a record by tag; null stands for what is not finite."""
    values = record["metrics"].items()
    return {tag(record["stage"], name): math.nan if value is None else value for name, value in values}


def _is_evaluated(record: dict) -> bool:
    return any(name.startswith(EVALUATION) for name in record["metrics"])


def _truncate(jsonl: Path, last_step: int) -> list[dict]:
    """Rewrite the file atomically with only the records up to `last_step`; returns these records."""
    if not jsonl.is_file():
        return []
    kept = [record for record in read_metrics(jsonl) if record["step"] <= last_step]
    temporary = jsonl.with_name(jsonl.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(jsonl)
    return kept
