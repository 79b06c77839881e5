"""Outputs of an evaluation: a table, a JSON record, and a file of the problems that are not solved yet."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from exprl_megatron.evaluation.eval_config import EvalConfig
from exprl_megatron.evaluation.evaluate import Evaluation
from exprl_megatron.evaluation.evaluation_table import evaluation_table
from exprl_megatron.evaluation.sample_counts import estimate_each_k
from exprl_megatron.utils.files import write_atomically


def result_table(settings: EvalConfig, evaluation: Evaluation) -> Table:
    """Build the table of pass@k with its intervals."""
    name = Path(settings.model).name or settings.model
    return evaluation_table({name: _counts(evaluation)}, settings.k, settings.problems.source, settings.confidence)


def result_lines(settings: EvalConfig, evaluation: Evaluation) -> list[str]:
    """Return lines about lengths, abstentions, problems left out, and values of k without enough samples."""
    record = result_record(settings, evaluation)
    tokens, overlong = record["mean_tokens"], record["overlong_share"]
    lines = [f"{tokens:.0f} tokens per sample, {overlong:.1%} ended by the length limit"]
    abstained = record["abstained"]
    if abstained["samples"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in abstained["reasons"].items())
        lines.append(f"abstentions: {abstained['samples']} samples of {abstained['problems']} problems ({reasons})")
        lines.append(f"problems without any result: {abstained['problems_without_verdict']}")
    for what, number in record["left_out"].items():
        if number:
            lines.append(f"{number} problems left out: {what}")
    estimated = {estimate["k"] for estimate in record["estimates"]}
    lines += [f"pass@{k} needs {k} graded samples, which no problem has" for k in settings.k if k not in estimated]
    return lines


def result_record(settings: EvalConfig, evaluation: Evaluation) -> dict:
    """Return all results as JSON types; `counts` has [graded samples, correct samples] of each problem."""
    results = evaluation.results
    samples = settings.samples * len(results)
    reasons = sum((Counter(result.counts.abstained) for result in results), Counter())
    found = estimate_each_k([result.counts for result in results], settings.k, settings.confidence)
    return {
        "model": settings.model,
        "problems": settings.problems.source,
        "samples": settings.samples,
        "sampling": settings.sampling.model_dump(mode="json"),
        "seed": settings.seed,
        "confidence": settings.confidence,
        "estimates": [asdict(estimate) for estimate in found],
        "mean_tokens": sum(result.tokens for result in results) / samples,
        "overlong_share": sum(result.overlong for result in results) / samples,
        "abstained": {
            "samples": reasons.total(),
            "problems": sum(bool(result.counts.abstained) for result in results),
            "problems_without_verdict": sum(not result.counts.graded for result in results),
            "reasons": dict(sorted(reasons.items())),
        },
        "left_out": {
            "nothing to verify with": evaluation.questions.unverifiable_count,
            "prompt too long": evaluation.questions.overlong_count,
        },
        "counts": _counts(evaluation),
    }


def record_text(settings: EvalConfig, evaluation: Evaluation) -> str:
    """Return `result_record` as JSON text."""
    return json.dumps(result_record(settings, evaluation), indent=1) + "\n"


def write_unsolved(path: Path, evaluation: Evaluation, max_solve_rate: float) -> int:
    """Write the problems with at most this share of correct samples; returns their number.

    Records are written as they were read. Problems of which all samples are abstentions are left out.
    """
    pairs = zip(evaluation.questions.questions, evaluation.results, strict=True)
    rates = [(question.record, result.counts.solve_rate) for question, result in pairs]
    unsolved = [record for record, rate in rates if rate is not None and rate <= max_solve_rate]
    write_atomically(path, "".join(json.dumps(record, default=str) + "\n" for record in unsolved).encode())
    return len(unsolved)


def _counts(evaluation: Evaluation) -> dict[str, list[int]]:
    return {result.problem_id: [result.counts.graded, result.counts.correct] for result in evaluation.results}
