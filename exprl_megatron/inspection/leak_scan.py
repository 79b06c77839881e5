"""`exprl leak-scan`: whether a run's saved rollouts show that anything of a reference reached the policy."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from exprl_megatron.config.problems import LeakGuardConfig, ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import RlStage
from exprl_megatron.errors import UserError
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.plugins.loading import use_plugin_path
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.reporting.fitted_table import print_table
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.directory import RunDirectory, read_config
from exprl_megatron.runs.journal import Journal
from exprl_megatron.utils.required import required

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAKS = ("leaking_requests", "canary_requests", "canary_traces")
"""The counts that must be 0."""
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class StageScan:
    """Findings in the rollouts of one stage; every trace is the answer to one request."""

    stage: str
    steps: int
    requests: int
    unguarded_requests: int
    """Their problem has no reference to look for: none at all, or nothing that its statement has not."""
    leaking_requests: int
    """They share a run of words with their reference."""
    canary_requests: int
    canary_traces: int
    reciting_traces: int
    """They share a run of words with their reference, which the policy may have found by itself."""
    reciting_by_chance: int
    """Traces that share one with the reference of the stage's next problem."""
    reproduced: float
    """Mean share of its reference's n-grams that a trace has, where there is something to look for."""

    @property
    def leaks(self) -> int:
        """Number of findings that are leaks."""
        return sum(getattr(self, name) for name in LEAKS)


@dataclass(frozen=True)
class RunScan:
    """Findings in a run, and the problems whose requests or traces leak, each once."""

    stages: list[StageScan]
    leaking_problems: list[str]
    ngram_words: int
    canary: bool
    """Whether a canary was looked for."""

    @property
    def leaks(self) -> int:
        """Number of leaks in all stages."""
        return sum(stage.leaks for stage in self.stages)


def report_leaks(run: Path, canary: str | None, as_json: bool) -> bool:
    """Scan a run and print what was found; returns whether anything leaked."""
    scan = scan_run(RunDirectory(run), canary)
    if as_json:
        print(json.dumps({"leaks": scan.leaks} | asdict(scan), indent=2))
    else:
        print_table(Console(), _table(scan))
        Console().print(_sentence(scan))
    return scan.leaks > 0


def scan_run(directory: RunDirectory, canary: str | None = None) -> RunScan:
    """Scan every step in the rollout log; `canary` takes the place of the config's.

    Raises:
        UserError: there is no run or no saved rollout, or where its problems or tokenizer are gone.
    """
    config = read_config(directory)
    use_plugin_path(config.plugin_path)
    watched = config.leak_guard.model_copy(update={"canary": canary}) if canary is not None else config.leak_guard
    journal = Journal(directory.journal)
    stages = [stage for stage in config.stages if isinstance(stage, RlStage) and journal.steps(stage.name)]
    if not stages:
        raise UserError(f"The run in {directory.root} has no saved rollouts; there is nothing to scan.")
    tokenizer = _tokenizer(config)
    guards = {problems: _GuardedProblems(watched, problems) for problems in {stage.problems for stage in stages}}
    leaking: dict[str, None] = {}
    scans = [_scan_stage(journal, stage.name, guards[stage.problems], tokenizer, leaking) for stage in stages]
    return RunScan(scans, list(leaking), watched.ngram_words, watched.canary is not None)


class _GuardedProblems:
    """A stage's problems under guard, each with the one after it, whose reference is a wrong one."""

    def __init__(self, config: LeakGuardConfig, problems: ProblemsConfig):
        loaded = load_problems(problems)
        ids = [problem.id for problem in loaded]
        self._source = problems.source
        self._next = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
        self.guard = LeakGuard(config, loaded)

    def next(self, problem_id: str) -> str:
        if problem_id not in self._next:
            raise UserError(
                f"The run has traces of the problem {problem_id!r}, which {self._source} has not; "
                "put back the problems that it learned from."
            )
        return self._next[problem_id]


def _scan_stage(
    journal: Journal,
    stage: str,
    problems: _GuardedProblems,
    tokenizer: "PreTrainedTokenizerBase",
    leaking: dict[str, None],
) -> StageScan:
    """Scan a stage; `leaking` gets the problems that leak, in order."""
    steps, terminal = journal.steps(stage), Console(stderr=True)
    found: dict[str, float] = defaultdict(float)
    for step in track(steps, f"scanning {stage}", console=terminal, transient=True, disable=not terminal.is_terminal):
        for group in required(journal.read(stage, step), f"step {step} of {stage} in the rollout log").groups:
            here = _findings(group, problems, tokenizer)
            if any(here[name] for name in LEAKS):
                leaking[group.problem_id] = None
            for name, value in here.items():
                found[name] += value
    guarded = found["requests"] - found["unguarded_requests"]
    counts = {field.name: int(found[field.name]) for field in fields(StageScan)[2:-1]}
    return StageScan(stage, len(steps), **counts, reproduced=found["reproduced"] / guarded if guarded else 0.0)


def _findings(group: Group, problems: _GuardedProblems, tokenizer: "PreTrainedTokenizerBase") -> dict[str, float]:
    """Return a group's share of the counts of StageScan; `reproduced` is a sum here."""
    guard, own, other = problems.guard, group.problem_id, problems.next(group.problem_id)
    prompts = {sample.trace.prompt_ids.tobytes(): sample.trace.prompt_ids for sample in group.samples}
    requests = {key: tokenizer.decode(ids.tolist()) for key, ids in prompts.items()}
    found: dict[str, float] = defaultdict(float)
    for trace in (sample.trace for sample in group.samples):
        request, overlap = requests[trace.prompt_ids.tobytes()], guard.overlap(own, trace.text)
        found["requests"] += 1
        found["unguarded_requests"] += not guard.is_guarded(own)
        found["leaking_requests"] += guard.overlap(own, request).matches > 0
        found["canary_requests"] += guard.has_canary(request)
        found["canary_traces"] += guard.has_canary(trace.text)
        found["reciting_traces"] += overlap.matches > 0
        found["reciting_by_chance"] += other != own and guard.overlap(other, trace.text).matches > 0
        found["reproduced"] += overlap.coverage
    return found


def _tokenizer(config: RunConfig) -> "PreTrainedTokenizerBase":
    if not Path(config.policy.model).is_dir():
        raise UserError(
            f"The policy's tokenizer in {config.policy.model} is gone; put it back, or scan from the directory "
            "that the run was started in."
        )
    return load_tokenizer(config.policy.model)


def _table(scan: RunScan) -> Table:
    table = Table(
        title="saved rollouts",
        caption=f"overlaps are runs of {scan.ngram_words} words, or all of a shorter reference, that the problem's "
        "statement does not have; those of traces are not leaks, but what the policy found or recites by itself",
    )
    for name in ("stage", "steps", "requests", "not guarded", "overlap", "canary", "canary in traces"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name in ("traces with overlap", "by chance", "of the reference"):
        table.add_column(name, justify="right", style="dim")
    for stage in scan.stages:
        canaries = (str(stage.canary_requests), str(stage.canary_traces)) if scan.canary else ("-", "-")
        counts = (stage.steps, stage.requests, stage.unguarded_requests, stage.leaking_requests)
        traces = (stage.reciting_traces / stage.requests, stage.reciting_by_chance / stage.requests, stage.reproduced)
        table.add_row(stage.stage, *map(str, counts), *canaries, *(f"{share:.1%}" for share in traces))
    return table


def _sentence(scan: RunScan) -> Text:
    if not scan.leaks:
        return Text(f"No leak in {sum(stage.requests for stage in scan.stages)} requests.", "green")
    names, more = scan.leaking_problems[:SHOWN_PROBLEMS], len(scan.leaking_problems) - SHOWN_PROBLEMS
    others = f" and {more} more" if more > 0 else ""
    return Text(f"{scan.leaks} leaks, of the problems {', '.join(names)}{others}.", "red")
