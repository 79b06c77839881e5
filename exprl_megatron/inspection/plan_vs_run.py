"""Compares a run's measured seconds and tokens with the planner's prediction for its config and lengths."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.table import Table

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.errors import UserError
from exprl_megatron.planning.hardware import Gpu, find_gpu
from exprl_megatron.planning.plan import Plan, plan
from exprl_megatron.planning.workload import Workload, workload_of
from exprl_megatron.reporting.fitted_table import print_table
from exprl_megatron.runs.directory import RunDirectory, read_config

MEASURED = {
    "sample and judge": ("sample", "judge"),
    "log-probs": ("ref log-probs", "log-probs"),
    "train": ("train",),
    "reshard": ("reshard",),
}
"""A row of the comparison, and the plan's phases that it sums."""
CLOCKS = {
    "sample and judge": "seconds/sample_and_grade",
    "log-probs": "seconds/log_probs",
    "train": "seconds/train",
    "reshard": "seconds/sync",
}
"""The run's clock of each row."""


@dataclass(frozen=True)
class ComparedFigure:
    """Predicted and measured seconds of one phase of one stage; None where a side has no figure."""

    stage: str
    phase: str
    predicted_s: float | None
    measured_s: float | None
    """Median over the stage's steps."""

    @property
    def ratio(self) -> float | None:
        """Predicted over measured."""
        return self.predicted_s / self.measured_s if self.predicted_s and self.measured_s else None


def print_comparison(run: Path, gpu_name: str | None, as_json: bool) -> None:
    """Print the rows of every stage; without `gpu_name` a run in fp32 is one of this machine's CPU, else of H100."""
    directory = RunDirectory(run)
    config = read_config(directory)
    require_finished_step(directory)
    gpu, how = prediction_device(config, gpu_name)
    rows = compare_run(config, directory, gpu)
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(run),
                    "gpu": asdict(gpu) | {"fp8_kinds": sorted(gpu.fp8_kinds)},
                    "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
                },
                indent=1,
            )
        )
        return
    console = Console()
    table = Table("stage", "phase", "predicted s", "measured s", "predicted / measured", title=f"{run} on {gpu.name}")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row.stage, row.phase, *map(_number, (row.predicted_s, row.measured_s, row.ratio)))
    print_table(console, table)
    console.print(how, markup=False, highlight=False, soft_wrap=True)


def require_finished_step(directory: RunDirectory) -> None:
    """Check that there is something to compare with, before this machine's CPU is measured, which takes seconds.

    Raises:
        UserError: no step is finished.
    """
    from exprl_megatron.reporting.metrics import read_metrics

    # A record of step 0 is an evaluation alone.
    if not any(record["step"] for record in read_metrics(directory.metrics)):
        raise UserError(f"The run in {directory.root} has finished no step; wait for one.")


def compare_run(config: RunConfig, directory: RunDirectory, gpu: Gpu) -> list[ComparedFigure]:
    """Compare every stage that has run at least one step."""
    from exprl_megatron.reporting.metrics import read_metrics

    records = read_metrics(directory.metrics)
    found = []
    for stage in config.stages:
        steps = [record["metrics"] for record in records if record["stage"] == stage.name and record["step"]]
        if steps:
            workload = observed_workload(config, stage, steps, directory)
            found += _rows(stage.name, plan(config, stage, workload, gpu), steps)
    return found


def observed_workload(config: RunConfig, stage: Stage, steps: list[dict], directory: RunDirectory) -> Workload:
    """Return the stage's step with the lengths that the run had: responses from its metrics, prompts from its
    journal.
    """
    responses = [step["length/mean"] for step in steps if step.get("length/mean")]
    guessed = workload_of(config, stage, response_tokens=fmean(responses) if responses else None)
    if not guessed.sampled:
        rows = [step["tokens"] / guessed.problems for step in steps if step.get("tokens")]
        return replace(guessed, response_tokens=fmean(rows)) if rows else guessed
    prompts = _prompt_lengths(directory, stage.name)
    return replace(guessed, prompt_tokens=fmean(prompts)) if prompts else guessed


def _prompt_lengths(directory: RunDirectory, stage: str) -> list[int]:
    """Return the prompt lengths of the last step in the rollout log."""
    from exprl_megatron.runs.journal import Journal

    journal = Journal(directory.journal)
    steps = journal.steps(stage)
    sampled = journal.read(stage, steps[-1]) if steps else None
    if sampled is None:
        return []
    return [len(member.trace.prompt_ids) for group in sampled.groups for member in group.samples]


def _rows(stage: str, planned: Plan, steps: list[dict]) -> list[ComparedFigure]:
    seconds = {phase.name: phase.seconds for phase in planned.phases}
    rows = []
    for name, parts in MEASURED.items():
        predicted = sum(seconds.get(part, 0.0) for part in parts)
        clocks = [step[CLOCKS[name]] for step in steps if step.get(CLOCKS[name])]
        if predicted or clocks:
            rows.append(ComparedFigure(stage, name, predicted or None, median(clocks) if clocks else None))
    # A checkpoint is written between steps.
    whole = sum(seconds.values()) - seconds["save"]
    measured = [took for step in steps if (took := step.get("seconds/step"))]
    return [*rows, ComparedFigure(stage, "step", whole, median(measured) if measured else None)]


def prediction_device(config: RunConfig, name: str | None) -> tuple[Gpu, str]:
    """Return the hardware to predict for, and a sentence about the prediction."""
    if name is None and config.policy.precision.dtype != "fp32":
        name = "h100"
    if name is not None:
        gpu = find_gpu(name)
        return gpu, f"Predicted for {gpu.name}, with the lengths that the run had; measured: medians over steps."
    from exprl_megatron.inspection.machine import measured_cpu

    gpu = measured_cpu(config.policy.layout.world_size)
    return gpu, (
        f"This machine's CPU was measured just now: {gpu.fp32_flops / 1e9:.1f} GFLOP/s a process in products, "
        f"{gpu.hbm_bytes_per_s / 1e9:.1f} GB/s in copies. The time model is one of GPUs and large models: for a small "
        "model on a CPU, whose time goes into starting operations, expect the order of magnitude alone."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
