"""Traces to judge and a judge's answers, without models: what benchmarks of the judging's host side share."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.load import check_config
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.judging.champ import champ_problems
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.sampler import Prompt, sample_groups
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.training.grading import GradeTrace, grade_of
from exprl_megatron.training.loop_lag import LoopLag
from exprl_megatron.utils.text_check import text_check_of

GROUP, SEGMENTS, ANSWER = 16, 10, 1600
JUDGE_DELAY_S = 0.2
CONTEXT = 131_072
DISTINCT = 512
"""Traces that are made; a larger step has each several times, for other problems."""


def outputs_of_models() -> list[list[str]]:
    """Return what models wrote about each problem of CHAMP, for those about which there is much."""
    texts = [_long_texts(record) for record in champ_problems().values()]
    return [found for found in texts if len(found) > 60]


def _long_texts(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree] if len(tree) > 400 else []
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return list(dict.fromkeys(text for part in inner for text in _long_texts(part)))


class Load:
    """Traces of about `tokens` tokens in ten segments, their problems, and a judge's answers.

    The last of `asked` is of a problem of its own; it is asked about before anything is measured.
    """

    def __init__(self, traces: int, tokens: int, tokenizer: Any):
        random, outputs = Random(0), outputs_of_models()
        self.tokenizer, self.tokens = tokenizer, tokens
        self.problems = [
            Problem(f"p{i}", f"Problem {i}: what is it?", Reference(outputs[i % len(outputs)][0]), "42")
            for i in range(1 + -(-traces // GROUP))
        ]
        self.traces = [self._trace(random, outputs[i // GROUP % len(outputs)], i) for i in range(min(traces, DISTINCT))]
        self.asked = [(self.problems[i // GROUP], self.traces[i % len(self.traces)]) for i in range(traces)]
        self.asked.append((self.problems[-1], self.traces[0]))
        # The steps' titles make a trace longer than `tokens`.
        self.longest = max(len(trace.token_ids) for trace in self.traces)
        answers = [text for found in outputs for text in found[1::2]]
        self.answers = ["".join(random.choices(answers, k=4))[:ANSWER] + "\n\nScore: 4" for _ in range(64)]

    def replies(self) -> list[str]:
        """Return what the judge's server sends."""
        return [reply(text, self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in self.answers]

    def _trace(self, random: Random, outputs: list[str], number: int) -> Trace:
        text, ids = f"Trace {number}.\n", []
        while len(ids) < self.tokens:
            text += "\n\n".join(random.choices(outputs, k=12)).replace("###", "")
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = self.tokenizer.decode(ids[: self.tokens])
        part = len(text) // SEGMENTS
        parts = [text[i * part : (i + 1) * part if i + 1 < SEGMENTS else None] for i in range(SEGMENTS)]
        text = "".join(f"\n### Step {i}\n{piece}" for i, piece in enumerate(parts))
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        problem = self.problems[number // GROUP].id
        return Trace(problem, number, ids[:1], ids, np.zeros(len(ids), np.float32), text, "stop", (("v", 0, len(ids)),))


def reply(text: str, token_ids: list[int], log_probs: bool = False) -> str:
    """Return a reply of /generate, as SGLang writes it."""
    meta = {"output_token_logprobs": [[-0.0109863, token, None] for token in token_ids]} if log_probs else {}
    meta |= {
        "finish_reason": {"type": "stop"},
        "prompt_tokens": 1,
        "weight_versions": [{"version": "v", "start": 0, "end": len(token_ids)}],
    }
    return msgspec.json.encode({"text": text, "output_ids": token_ids, "meta_info": meta}).decode()


@contextmanager
def paced_server(bodies: list[str], *options: str) -> Iterator[str]:
    """The URL of a server that gives these replies."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(bodies, file)
        file.flush()
        command = [sys.executable, str(Path(__file__).with_name("paced_server.py")), file.name, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()
            process.wait()


class Timed:
    """A judge's client; keeps by how much each answer came later than the judge takes."""

    def __init__(self, client: SGLangClient):
        self._client = client
        self.late_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, *arguments: Any, **options: Any) -> Any:
        """Return the client's."""
        started = time.perf_counter()
        written = await self._client.generate(*arguments, **options)
        if options["max_new_tokens"]:
            self.late_s.append(time.perf_counter() - started - JUDGE_DELAY_S)
        return written

    async def generate_all(self, *arguments: Any, **options: Any) -> Any:
        """Return the client's."""
        started = time.perf_counter()
        written = await self._client.generate_all(*arguments, **options)
        self.late_s.append(time.perf_counter() - started - JUDGE_DELAY_S)
        return written


async def sampled(load: Load, policy: SGLangClient, grade: GradeTrace) -> list[GradedTrace]:
    """Return the load's traces as a step samples them; each is graded when it is there."""
    graded: list[GradedTrace] = []
    problems = {problem.id: problem for problem in load.problems}

    async def take(trace: Trace) -> None:
        graded.append(await grade(problems[trace.problem_id], trace))

    await sample_groups(
        StaticPool([policy]),
        [Prompt(problem.id, [1] * 256) for problem in load.problems[:-1]],
        GROUP,
        SamplingConfig(max_new_tokens=load.longest),
        lambda problem, sample: sample,
        weight_versions=["v"],
        on_trace=take,
    )
    return graded


async def judged(load: Load, model: str, judge_url: str, policy_url: str | None, store: Path) -> dict[str, float]:
    """Return all of the load, as training grades it; the traces come from the policy's server where there is one."""
    stage = {"kind": "exprl-process", "name": "a", "steps": 1, "problems": {"source": "x"}}
    tree = {"directory": "d", "policy": {"model": "m"}, "judge": {"model": model}, "stages": [stage]}
    lag, busy = LoopLag(), [0.0]
    lag.start()

    async def watch_thread() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.01)
            busy[0] = max(busy[0], time.thread_time() - before)

    watching = asyncio.create_task(watch_thread())

    async def right(problem: Problem, trace: Trace) -> GradedTrace:
        return GradedTrace(trace, Scored(1.0))

    with JudgementStore(store) as kept:
        async with SGLangClient(judge_url, "judge-0") as client, SGLangClient(policy_url or judge_url, "p-0") as policy:
            timed, policy.text_check = Timed(client), text_check_of(load.tokenizer)
            judge = Judge(JudgeConfig(model=model, concurrency=256), [timed], load.tokenizer, CONTEXT, kept)
            grade = grade_of(check_config(tree, "bench").stages[0], judge, right, load.tokenizer)
            await grade(*load.asked[-1])
            lag.take(), timed.late_s.clear()
            busy[0] = 0.0

            cpu, wall = time.process_time(), time.perf_counter()
            if policy_url is None:
                graded = await asyncio.gather(*(grade(problem, trace) for problem, trace in load.asked[:-1]))
            else:
                graded = await sampled(load, policy, grade)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    lag.stop()
    watching.cancel()
    assert all(isinstance(found.judgement, Scored) for found in graded)
    late = sorted(timed.late_s)
    return {
        "traces": len(graded),
        "segments": sum(len(found.segments) for found in graded) / len(graded),
        "tokens": sum(len(found.trace.token_ids) for found in graded) / len(graded),
        "cpu_ms_a_trace": cpu / len(graded) * 1e3,
        "seconds": wall,
        "lag_max_s": lag.take(),
        "loop_busy_max_s": busy[0],
        "late_median_s": late[len(late) // 2],
        "late_p99_s": late[len(late) * 99 // 100],
        "late_max_s": late[-1],
    }
