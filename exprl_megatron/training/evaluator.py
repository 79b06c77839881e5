"""Measures pass@k of the servers' weights on held-out problems; each evaluation is made once and stored."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.evaluation.pass_at_k import GradedCounts
from exprl_megatron.evaluation.sample_counts import count_samples, estimate_each_k
from exprl_megatron.reporting.tags import EVALUATION
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.directory import RunDirectory, write_atomically
from exprl_megatron.runs.journal import SampledStep, write_step
from exprl_megatron.training.graded_sampling import SamplePlan
from exprl_megatron.training.judging_runtime import JudgingRuntime
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.run_logger import RunLogger

START = "start"


class Evaluator:
    """Makes evaluations, on rank 0; each has a JSON file of results and a file of answers in the rollout log's format.

    The JSON file has weight_version, counts (problem: [graded, correct]), estimates, mean_tokens (of a response),
    shares of the samples (overlong_share, abstained_share), and seconds.
    """

    def __init__(
        self, config: RunConfig, paths: RunDirectory, rollouts: Rollouts, judging: JudgingRuntime, logger: RunLogger
    ):
        self._config = config
        self._directory = paths.evaluations
        self._rollouts = rollouts
        self._judging = judging
        self._logger = logger

    def done(self, name: str) -> bool:
        """Return whether the evaluation `name` (see evaluation_name) has been made."""
        return self._file(name).is_file()

    async def evaluate(self, name: str, version: str) -> None:
        """Sample the held-out problems under the weights `version` and verify every trace.

        All evaluations of a run have the same seeds, so that only the weights differ.
        """
        settings, started = self._config.required_evaluation, time.monotonic()
        plan = SamplePlan(
            ("evaluation", 0),
            settings.problems,
            range(self._rollouts.problems.count(settings.problems)),
            settings.samples,
            settings.sampling,
            [version],
        )
        groups = await self._rollouts.sampler.sample(plan, self._judging.grade_by_answer())
        counts = {group.problem_id: count_samples(sample.judgement for sample in group.samples) for group in groups}
        found = estimate_each_k(list(counts.values()), settings.k, settings.confidence)
        record = {
            "weight_version": version,
            "counts": {problem_id: (of.graded, of.correct) for problem_id, of in counts.items()},
            "estimates": [asdict(e) for e in found],
            **_shares(groups),
            "seconds": time.monotonic() - started,
        }
        self._file(name).parent.mkdir(exist_ok=True)
        # The results are written last: their file marks the evaluation as made.
        answers = SampledStep(groups, prompts_consumed=len(groups))
        await asyncio.to_thread(write_step, self._file(name).with_suffix(".parquet"), answers)
        write_atomically(self._file(name), json.dumps(record, indent=1).encode())
        shown = ", ".join(f"pass@{e.k} {e.mean:.1%} [{e.low:.1%}, {e.high:.1%}]" for e in found)
        self._logger.log(f"evaluation of {name}: {shown}")

    def log(self, stage: Stage | None, step: int | None) -> None:
        """Record an evaluation in the run's metrics, once; arguments as of `evaluation_name`."""
        record = self._read(evaluation_name(stage, step))
        steps = 0 if stage is None else stage.steps if step is None else step
        self._logger.evaluated(stage, steps, evaluation_metrics(record))

    def all(self) -> dict[str, GradedCounts]:
        """Return the counts of every evaluation made so far, in the order in which they are made."""
        names = [START, *(name for stage in self._config.stages for name in self._of_stage(stage))]
        return {name: self._read(name)["counts"] for name in names if self.done(name)}

    def _of_stage(self, stage: Stage) -> list[str]:
        made = (int(path.stem.removeprefix("step-")) for path in (self._directory / stage.name).glob("step-*.json"))
        return [*(evaluation_name(stage, step) for step in sorted(made)), stage.name]

    def _read(self, name: str) -> dict[str, Any]:
        return json.loads(self._file(name).read_text())

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def evaluation_name(stage: Stage | None, step: int | None) -> str:
    """Return the name of an evaluation: before the first stage (None), after all steps of `stage`, or after `step`."""
    if stage is None:
        return START
    return stage.name if step is None else f"{stage.name}/step-{step}"


def evaluation_metrics(record: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation's file, for metrics.jsonl and trackers."""
    found: dict[str, float] = {}
    for estimate in record["estimates"]:
        name = f"{EVALUATION}pass@{estimate['k']}"
        found |= {name: estimate["mean"], f"{name}/low": estimate["low"], f"{name}/high": estimate["high"]}
    more = {
        "length/mean": "mean_tokens",
        "length/overlong": "overlong_share",
        "abstained": "abstained_share",
        "seconds": "seconds",
    }
    # Files of earlier versions have only counts and estimates.
    return found | {f"{EVALUATION}{name}": record[key] for name, key in more.items() if key in record}


def _shares(groups: Sequence[Group]) -> dict[str, float]:
    samples = [sample for group in groups for sample in group.samples]
    return {
        "mean_tokens": sum(len(sample.trace.token_ids) for sample in samples) / len(samples),
        "overlong_share": sum(sample.trace.overlong for sample in samples) / len(samples),
        "abstained_share": sum(sample.score is None for sample in samples) / len(samples),
    }
