"""Whether a run learned what it should have: no step lost or taken twice, and no number that no server sent."""

import json
from collections.abc import Iterator

import numpy as np

from benchmarks.flat_replies import listed
from exprl_megatron.config.run import RunConfig
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal


class Replies:
    """What the servers of a run themselves replied to /generate, whatever became of it on its way."""

    def __init__(self):
        self._sampled: set[tuple[bytes, bytes, str]] = set()
        self._judged: set[str] = set()

    def add(self, server: str, body: bytes) -> None:
        """A reply of the server of that name."""
        reply = json.loads(body)
        listed(reply)
        if server.startswith("judge"):
            self._judged.add(reply["text"])
        elif entries := reply["meta_info"].get("output_token_logprobs"):
            log_probs = [entry[0] for entry in entries]
            self._sampled.add(_key(reply["output_ids"], log_probs, reply["text"]))

    def unsent(self, group: Group) -> Iterator[str]:
        """Yield what the group's traces and scores have that no server sent."""
        for member in group.samples:
            trace = member.trace
            if _key(trace.token_ids, trace.log_probs, trace.text) not in self._sampled:
                yield f"sample {trace.sample} is of no server"
            if isinstance(member.judgement, Scored) and member.judgement.evidence not in self._judged:
                yield f"the score of sample {trace.sample} is of no judge"

    @property
    def counts(self) -> str:
        """How many replies differ."""
        return f"{len(self._sampled)} traces and {len(self._judged)} verdicts"


def wrong_with(config: RunConfig, replies: Replies | None = None, steps: int | None = None) -> list[str]:
    """Return what a run of one strictly on-policy stage has lost, counted twice, or learned from wrong weights.

    In its first `steps` steps, after which it was ended (None: in all). With `replies`, also what it learned that no
    server of its own sent.
    """
    (stage,) = config.stages
    steps = stage.steps if steps is None else steps
    paths = RunDirectory(config.directory)
    logged = [json.loads(line)["step"] for line in paths.metrics.read_text().splitlines()]
    found = [] if logged == list(range(1, steps + 1)) else [f"steps learned: {logged}"]
    problems, journal = load_problems(stage.problems), Journal(paths.journal)
    for step in range(1, steps + 1):
        sampled = journal.read(stage.name, step)
        first = (step - 1) * stage.problems_per_step
        indices = problem_indices(config.seed, stage.name, first, stage.problems_per_step, len(problems))
        if [group.problem_id for group in sampled.groups] != [problems[i].id for i in indices]:
            found.append(f"step {step} has other problems than its own")
        for group in sampled.groups:
            wrong = [*_wrong_traces(group, stage.group_size, f"v{(step - 1) * stage.updates_per_step}")]
            wrong += [] if replies is None else replies.unsent(group)
            found += [f"step {step}, {group.problem_id}: {what}" for what in wrong]
    return found


def _wrong_traces(group: Group, size: int, version: str) -> Iterator[str]:
    traces = [member.trace for member in group.samples]
    if [trace.sample for trace in traces] != list(range(size)):
        yield f"samples {[trace.sample for trace in traces]}"
    wrong = {name for trace in traces for name, _, _ in trace.weight_versions} - {version}
    covered = all(trace.weight_versions[-1][2] == len(trace.token_ids) for trace in traces)
    if wrong or not covered:
        yield f"weights {sorted(wrong)} instead of {version}"


def _key(token_ids, log_probs, text: str) -> tuple[bytes, bytes, str]:
    return np.asarray(token_ids, np.int32).tobytes(), np.asarray(log_probs, np.float32).tobytes(), text
