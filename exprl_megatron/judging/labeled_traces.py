"""Traces whose correctness is known, with their problems: the data on which a judge is calibrated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.problems.records import DOMAINS, parse_record, raise_faults


@dataclass(frozen=True)
class LabeledTrace:
    """A trace, its problem with the right reference, and whether the trace is right."""

    problem: Problem
    text: str
    correct: bool


def read_labeled_traces(
    path: str | Path, limit: int | None = None, domains: Sequence[str] = DOMAINS
) -> tuple[LabeledTrace, ...]:
    """Read the first `limit` traces of a JSON-lines file, in its order.

    A line is an object with `problem_id`, `problem`, `reference`, `trace` (texts), `correct` (true or
    false), and optionally `answer`, `domain` (one of `domains`) and `choices`.

    Raises:
        UserError: the file or a line of it is faulty (one sentence for each of the first ten faults), or the traces
            are all right, all wrong, or of a single problem, so that there is no wrong reference.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The labeled traces {path} cannot be read ({error}); give a file of JSON lines.") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()][:limit]
    traces: list[LabeledTrace] = []
    faults: list[str] = []
    problems: dict[str, Problem] = {}
    for number, line in numbered:
        trace = _labeled_trace(line, domains)
        if isinstance(trace, list):
            faults += [f"{path} line {number}: {sentence}" for sentence in trace]
        elif problems.setdefault(trace.problem.id, trace.problem) != trace.problem:
            faults.append(f"{path} line {number}: {trace.problem.id!r} is another problem further up; rename one.")
        else:
            traces.append(trace)
    raise_faults(faults)
    _check_sides(path, traces, len(problems))
    return tuple(traces)


def _check_sides(path: Path, traces: list[LabeledTrace], problems: int) -> None:
    right = sum(trace.correct for trace in traces)
    if not 0 < right < len(traces):
        raise UserError(
            f"{path}: {right} of the {len(traces)} selected traces are right; calibration needs right and wrong "
            "ones, so add such traces, or raise the limit."
        )
    if problems < 2:
        raise UserError(f"{path}: all traces are of one problem, so that there is no wrong reference; add others.")


def _labeled_trace(line: str, domains: Sequence[str]) -> LabeledTrace | list[str]:
    """Parse a line; returns the trace, or the faults of the line."""
    record = parse_record(line)
    if isinstance(record, str):
        return [record]
    if faults := list(_faults(record, domains)):
        return faults
    problem = Problem(
        id=record["problem_id"],
        text=record["problem"],
        reference=Reference(record["reference"]),
        answer=record.get("answer"),
        domain=record.get("domain", "math"),
        choices=tuple(record.get("choices", ())),
    )
    return LabeledTrace(problem, record["trace"], record["correct"])


def _faults(record: dict[str, Any], domains: Sequence[str]) -> Iterator[str]:
    for name in ("problem_id", "problem", "reference", "trace"):
        if not isinstance(record.get(name), str):
            yield f"the field {name!r} is {record.get(name)!r}, not text; write it as text."
        elif name != "trace" and not record[name].strip():
            yield f"the field {name!r} is empty; fill it or leave the trace out."
    if not isinstance(record.get("correct"), bool):
        yield f"the field 'correct' is {record.get('correct')!r}; write true or false."
    if not isinstance(record.get("answer", ""), str | None):
        yield f"the field 'answer' is {record['answer']!r}, not text; write it as text."
    if record.get("domain", "math") not in domains:
        yield f"the field 'domain' is {record['domain']!r}; write one of {', '.join(domains)}."
    choices = record.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        yield f"the field 'choices' is {choices!r}; write a list of texts."
