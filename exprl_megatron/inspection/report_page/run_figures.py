"""What a page shows of a run as a whole: its curves, evaluations, record, and where its time went."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.report_page.judge_figures import reason_word
from exprl_megatron.reporting.metrics import read_metrics
from exprl_megatron.reporting.plain_text import escaped
from exprl_megatron.reporting.tags import EVALUATION
from exprl_megatron.reporting.timeline import ROLLOUTS, STEP, Span, read_timeline
from exprl_megatron.reporting.waterfall import PHASES, REMEDIES, bottleneck, mean_phases, step_times
from exprl_megatron.runs.directory import RunDirectory

_RECORDED = ("version", "commit", "modified", "command", "host", "start", "end")
"""Entries of run.json that a page shows."""
_DRAWN_STEPS = 60
"""Number of a stage's last steps whose spans are in the page."""


def curves(directory: RunDirectory) -> dict[str, Any]:
    """Return {steps, stages, wall, metrics: {name: values}, evaluations} of metrics.jsonl; None stands for a missing
    value.

    Steps count over all stages; `wall` is in seconds of the run.
    """
    records = read_metrics(directory.metrics)
    steps = [record for record in records if _learned(record)]
    names = dict.fromkeys(name for record in steps for name in record["metrics"] if _is_curve(name))
    return {
        "steps": [record["step"] for record in steps],
        "stages": [record["stage"] for record in steps],
        "wall": [record["wall_s"] for record in steps],
        "metrics": {name: [record["metrics"].get(name) for record in steps] for name in names},
        "evaluations": [_evaluation(record) for record in records if _evaluated(record)],
    }


def _is_curve(name: str) -> bool:
    """Return whether the tag is a curve: no evaluation, and no whole text by which a user's verifier named a metric."""
    group, _, reason = name.partition("/")
    return group != EVALUATION.rstrip("/") and (group != "abstained" or reason_word(reason) == reason)


def run_to_dict(directory: RunDirectory, canary: str | None) -> dict[str, Any]:
    """Return what run.json says of the run, as texts; empty where it is missing or damaged.

    With a `canary`, which may be empty, the page is without references: no message of an error, which may quote one,
    and no command that has the canary.
    """
    try:
        found = json.loads(directory.record.read_bytes())
        found |= found.get("exit") or {}
        if canary is not None:
            found.pop("message", None)
            if canary and canary in str(found.get("command")):
                found.pop("command")
        return {
            name: escaped(str(found[name])) for name in (*_RECORDED, "status", "message") if found.get(name) is not None
        }
    except (OSError, ValueError, AttributeError):
        return {}


def time_spent(directory: RunDirectory) -> dict[str, Any]:
    """Return {phases, steps: [{stage, step, seconds}], stages: {stage: sentence}, spans} of timeline.jsonl."""
    try:
        spans = read_timeline(directory.timeline)
    except UserError:
        spans = []
    times = step_times(spans)
    stages = dict.fromkeys(time.stage for time in times)
    of_stage = {stage: [time for time in times if time.stage == stage] for stage in stages}
    return {
        "phases": PHASES,
        "remedies": REMEDIES,
        "steps": [
            {"stage": time.stage, "step": time.step, "seconds": [round(time.phases[name], 4) for name in PHASES]}
            for time in times
        ],
        "stages": {stage: bottleneck(mean_phases(found)) for stage, found in of_stage.items()},
        "spans": [span for stage, found in of_stage.items() for span in _spans(spans, stage, found[-1].step)],
    }


def predictions(config: RunConfig, directory: RunDirectory) -> dict[str, Any]:
    """Return {device, rows: [{stage, phase, predicted_s, measured_s}]} by the planner, or {missing: why there
    is none}.
    """
    from exprl_megatron.inspection.plan_vs_run import compare_run, prediction_device, require_finished_step

    try:
        require_finished_step(directory)
        gpu, how = prediction_device(config, None)
        rows = compare_run(config, directory, gpu)
    except (UserError, OSError, ValueError, KeyError) as error:
        return {"missing": escaped(f"The planner has no prediction for this run: {error}")}
    found = [
        {"stage": row.stage, "phase": row.phase, "predicted_s": row.predicted_s, "measured_s": row.measured_s}
        for row in rows
    ]
    return {"device": gpu.name, "how": how, "rows": found}


def config_rows(configs: Sequence[RunConfig], without_references: bool) -> list[dict[str, Any]]:
    """Return [{key, values: a text for each run, differs}] of all keys; of the canary its presence alone where asked
    for.
    """
    flat = [_flat(config.model_dump(mode="json")) for config in configs]
    if without_references:
        for values in flat:
            if values.get("leak_guard.canary", "null") != "null":
                values["leak_guard.canary"] = "(left out)"
    keys = dict.fromkeys(key for values in flat for key in values)
    found = []
    for key in keys:
        texts = [escaped(of_run.get(key, "")) for of_run in flat]
        found.append({"key": escaped(key), "values": texts, "differs": len(set(texts)) > 1})
    return found


def evaluation_names(directory: RunDirectory, stages: Sequence[str]) -> list[str]:
    """Return the evaluations whose answers were kept, in the order of the run, whose stages are `stages`.

    Times of files do not say that order: a copy of a run may have others.
    """
    place = {name: index for index, name in enumerate(stages)}

    def order(name: str) -> tuple[int, float, str]:
        stage, _, step = name.partition("/step-")
        # The evaluation before the first stage has the name of none; that of a stage follows those of its steps.
        return place.get(stage, -1), int(step) if step.isdecimal() else math.inf, name

    kept = directory.evaluations.rglob("*.parquet")
    return sorted((path.relative_to(directory.evaluations).with_suffix("").as_posix() for path in kept), key=order)


def _learned(record: Mapping) -> bool:
    return any(not name.startswith(EVALUATION) for name in record["metrics"])


def _evaluated(record: Mapping) -> bool:
    return any(name.startswith(EVALUATION) for name in record["metrics"])


def _evaluation(record: Mapping) -> dict[str, Any]:
    values = {
        name.removeprefix(EVALUATION): value for name, value in record["metrics"].items() if name.startswith(EVALUATION)
    }
    return {"stage": record["stage"], "step": record["step"], "wall": record["wall_s"], "values": values}


def _spans(spans: Sequence[Span], stage: str, last: int) -> list[list]:
    """Return [stage, step, name, start, end] of the last steps of a stage, without the spans that only enclose
    others.
    """
    return [
        [span.stage, span.step, span.name, span.start, span.end]
        for span in spans
        if span.stage == stage and span.step > last - _DRAWN_STEPS and span.name not in (STEP, ROLLOUTS)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Return each leaf as JSON by its dotted key; stages by their names."""
    if isinstance(tree, dict) and tree:
        items = list(tree.items())
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) and "name" in item for item in tree):
        items = [(item["name"], item) for item in tree]
    else:
        return {prefix: tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)}
    return {
        key: value
        for name, item in items
        for key, value in _flat(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each run: the shortest end of its path that distinguishes it from the others."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [escaped(name) for name in names]
