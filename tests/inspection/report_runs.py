"""A small run's directory for tests of `exprl report`, written by the project's own writers."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import yaml
from transformers import AutoTokenizer

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.rubric import Checkpoint, Rubric
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.reporting.timeline import Span
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import Journal, SampledStep, write_step
from exprl_megatron.runs.log_prob_files import TraceLogProbs, TrainerLogProbFiles

POLICY = Path(__file__).parents[2] / "recipes" / "miniature" / "policy"
CANARY = "canary-7f3a91c2e5"
REFERENCE = f"first subtract seven then double the remainder {CANARY} so the total becomes twenty one"
FIRST, SECOND = "s1 6 + 3 = 9", "s2 9 - 2 = 7"
STAGES = (("exprl-process", "parts"), ("sparse-rl", "sparse"))
STEPS = 3
"""Of each stage."""


def write_run(root: Path, problem: str = "train-1", said: str = "well done", learning_rate: float = 1e-4) -> Path:
    """A run of a process stage and a sparse one; `problem` is its first problem's id, `said` what everyone says."""
    root.mkdir(parents=True)
    _write_config(root, problem, learning_rate)
    _write_figures(root)
    with JudgementStore(root / "judgements.sqlite") as store:
        for step in range(1, STEPS + 1):
            groups = [_judged_group(problem, said, store, step), _judged_group("train-2", said, None, step)]
            Journal(root / "journal").write("parts", step, SampledStep(groups, 2))
    _write_trainer_log_probs(root, groups[0].samples[0].trace)
    right = [_graded("train-2", number, Scored(float(number % 2), said)) for number in range(2)]
    for step in range(1, STEPS + 1):
        Journal(root / "journal").write("sparse", step, SampledStep([Group("train-2", tuple(right))], 1))
    (root / "evaluations").mkdir()
    write_step(root / "evaluations" / "start.parquet", SampledStep([Group("train-2", tuple(right))], 1))
    return root


def write_killed_run(root: Path) -> Path:
    """A run that was killed in its first step: it leaves its config alone."""
    root.mkdir(parents=True)
    _write_config(root, "train-1", 1e-4)
    (root / "metrics.jsonl").write_text("")
    return root


def write_unscored_run(root: Path) -> Path:
    """A run of one step without any score, with metrics that are not finite as Python's json writes them."""
    write_killed_run(root)
    unscored = tuple(_graded("train-2", number, Abstained("timeout", "no answer")) for number in range(2))
    Journal(root / "journal").write("sparse", 1, SampledStep([Group("train-2", unscored)], 1))
    metrics = {"loss": float("nan"), "kl/old": float("inf"), "reward/mean": 0.0, "seconds/step": 1.0}
    evaluation = {"evaluation/pass@1": None, "evaluation/pass@1/low": None, "evaluation/pass@1/high": None}
    records = [(0, evaluation), (1, metrics)]
    lines = [json.dumps({"stage": "sparse", "step": n, "wall_s": 1.0, "metrics": values}) for n, values in records]
    (root / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_step_of_an_earlier_version(root: Path) -> None:
    """A step after the last whose verifier's reason for an abstention is the reference."""
    samples = tuple(_graded("train-2", number, Abstained(REFERENCE, REFERENCE)) for number in range(2))
    Journal(root / "journal").write("sparse", STEPS + 1, SampledStep([Group("train-2", samples)], 1))


def _write_trainer_log_probs(root: Path, trace: Trace) -> None:
    """Of one trace of the first step: half a nat above the sampler's for its second token, the same for the others."""
    trainer = trace.log_probs.copy()
    trainer[1] += 0.5
    files = TrainerLogProbFiles(root / "trainer_log_probs")
    files.write_part("parts", 1, (0, 1), [TraceLogProbs(0, trace.sample, trainer)])
    files.publish("parts", 1, 1, 1.0)


def _write_config(root: Path, problem: str, learning_rate: float) -> None:
    problems = root / "problems.jsonl"
    rows = [
        {"id": name, "problem": "Q 6 s1 + 3 s2 - 2 A", "reference": REFERENCE, "answer": f"{CANARY}-answer"}
        for name in (problem, "train-2")
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"steps": STEPS, "problems": {"source": str(problems)}, "group_size": 2}
    shared |= {"sampling": {"max_new_tokens": 64}, "optimizer": {"lr": learning_rate}}
    stages = [shared | {"kind": kind, "name": name} for kind, name in STAGES]
    stages[0]["estimator"] = "delta"
    tree = {"directory": str(root), "policy": {"model": str(POLICY), "max_tokens": 160}, "judge": {"model": "j"}}
    tree |= {"stages": stages, "leak_guard": {"canary": CANARY}}
    tree["evaluation"] = {"problems": {"source": str(problems)}, "sampling": {"max_new_tokens": 64}}
    (root / "config.yaml").write_text(yaml.safe_dump(tree))


def _write_figures(root: Path) -> None:
    """metrics.jsonl, timeline.jsonl and run.json of 2 x STEPS steps of 10 s: 6 s sampling, 3 s training, 1 s sync."""
    records = [_evaluation("parts", 0, 0.1)]
    spans = []
    for number in range(1, 2 * STEPS + 1):
        stage, step = STAGES[(number - 1) // STEPS][1], (number - 1) % STEPS + 1
        metrics = {"reward/mean": number / 10, "loss": -0.5, "seconds/step": 10.0, "sync/send": 0.75, "sync/load": 0.25}
        metrics |= {"kl/old": None} if number == 1 else {"kl/old": 0.01}
        records.append({"stage": stage, "step": number, "wall_s": 10.0 * number, "metrics": metrics})
        start = 10.0 * number
        parts = (("sync", 0, 1), ("sampling", 1, 7), ("grading", 2, 7), ("sample_and_grade", 1, 7), ("train", 7, 10))
        spans += [Span(stage, step, name, start + a, start + b) for name, a, b in (*parts, ("step", 0, 10))]
    records.append(_evaluation("sparse", 2 * STEPS, 0.6))
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "timeline.jsonl").write_text("".join(json.dumps(asdict(span)) + "\n" for span in spans))
    record = {"version": "0.1.0", "command": "exprl train x.yaml", "start": "2026-01-02T03:04:05+00:00"}
    (root / "run.json").write_text(json.dumps(record | {"end": "2026-01-02T03:05:05+00:00", "exit": {"status": 0}}))


def _evaluation(stage: str, step: int, value: float) -> dict:
    metrics = {"pass@1": value, "pass@1/low": value - 0.05, "pass@1/high": value + 0.1}
    named = {f"evaluation/{name}": number for name, number in metrics.items()}
    return {"stage": stage, "step": step, "wall_s": 10.0 * step + 1, "metrics": named}


def _judged_group(problem: str, said: str, store: JudgementStore | None, step: int) -> Group:
    """Judge and verifier agree on the first trace and not on the second, whose first segment has no score."""
    agreed = _cut(problem, 0, (Scored(0.25, said), Scored(1.0, said)), Scored(1.0, f"found {CANARY}-answer"))
    hacked = _cut(problem, 1, (Abstained("unreadable", said), Scored(0.75, said)), Scored(0.0, "no answer"))
    samples = [agreed, hacked]
    if store is not None:
        samples[0] = _stored(agreed, said, store, step)
    return Group(problem, tuple(samples))


def _stored(sample: GradedTrace, said: str, store: JudgementStore, step: int) -> GradedTrace:
    """The same with the last segment's judgement in the store, by a rubric."""
    rubric = Rubric((Checkpoint("reaches the total", 2.0, REFERENCE[:40]), Checkpoint("says it", 1.0, CANARY)))
    key = f"{step:064x}"
    asked = {"problem": "p", "unit": "prefix", "rubric": json.loads(rubric.to_json())}
    asked["messages"] = [{"role": "user", "content": f"The reference is: {REFERENCE}. {said}"}]
    last = sample.segments[-1]
    answer = f"Mark 1: established\nMark 2: absent\nas {CANARY} {said}"
    store.add_judgement(key, asked, answer, replace(last.judgement, evidence=answer))
    judged = replace(last.judgement, evidence=answer, hash=key)
    return replace(sample, judgement=judged, segments=(*sample.segments[:-1], replace(last, judgement=judged)))


def _cut(problem: str, number: int, judgements: tuple, verified) -> GradedTrace:
    """FIRST and SECOND as a word-level tokenizer's server decodes them, each a segment."""
    sample = _graded(problem, number, judgements[-1])
    half = len(_tokenizer().encode(FIRST, add_special_tokens=False))
    spans = ((0, half), (half, len(sample.trace.token_ids)))
    segments = tuple(JudgedSegment(*span, judgement) for span, judgement in zip(spans, judgements, strict=True))
    return replace(sample, segments=segments, verified=verified)


def _graded(problem: str, number: int, judgement) -> GradedTrace:
    tokenizer = _tokenizer()
    ids = tokenizer.encode(f"{FIRST} {SECOND}", add_special_tokens=False)
    log_probs = [-0.25 * (1 + place % 4) for place in range(len(ids))]
    prompt = tokenizer.encode("Q 6 s1 + 3 s2 - 2 A", add_special_tokens=False)
    trace = Trace(problem, number, prompt, ids, log_probs, " " + tokenizer.decode(ids), "stop", (("v0", 0, len(ids)),))
    return GradedTrace(trace, judgement)


@cache
def _tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)
