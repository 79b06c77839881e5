"""What judging by prefixes takes of the host, without a model: processor time, the event loop's lag, bytes on disk.

`prefixes`: traces are cut, judged in ten beginnings each and stored, by the project's own grading, judge, client and
store; the judge is a process that sends prepared answers. Processor seconds of this process, all threads, and as a
multiple of what the tokenizer alone takes for each trace once (which the load of the machine changes alike).

`loop`: the same while replies of a policy, in whole groups, come in over some time. The longest lag of the event loop,
the processor time that its thread spent in one go (which a loaded machine does not lengthen as much), and by how much
judge answers were later here than they left the judge.

`store`: judgements on model outputs of CHAMP, then copies of them under other keys until the store has so many rows:
bytes a row, and milliseconds of processor time to keep one, to find one, and to list the newest.

    python tools/bench_judging_host.py prefixes [--traces 64] [--tokens 6000] [--model DIR] [--json F]
    python tools/bench_judging_host.py loop [--traces 256] [--tokens 16000] [--seconds 60] [--model DIR] [--json F]
    python tools/bench_judging_host.py store [--rows 20000] [--json F]
"""

import argparse
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
from transformers import AutoTokenizer

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.load import check_config
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.judging.content_key import content_key
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.judging.prompt import shipped_prompt
from exprl_megatron.judging.store import Asked, JudgementStore
from exprl_megatron.problems.datasets.packaged import champ_problems
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.sampler import Prompt, sample_groups
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.servers import FixedServers
from exprl_megatron.text_check import text_check_of
from exprl_megatron.training.grading import Grade, grade_of
from exprl_megatron.training.loop_lag import HOST_THREADS, LoopLag

GROUP, SEGMENTS, ANSWER = 16, 10, 1600
JUDGE_DELAY_S = 0.2
REAL_ROWS = 320
CONTEXT = 131_072
DISTINCT = 128
"""Traces that are made; a larger step has each several times, for other problems."""


def outputs_of_models() -> list[list[str]]:
    """What models wrote about each problem of CHAMP, for those about which there is much."""
    texts = [_long_texts(record) for record in champ_problems().values()]
    return [found for found in texts if len(found) > 60]


def _long_texts(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree] if len(tree) > 400 else []
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return list(dict.fromkeys(text for part in inner for text in _long_texts(part)))


class Load:
    """Traces of about `tokens` tokens in ten segments, their problems, and a judge's answers."""

    def __init__(self, traces: int, tokens: int, tokenizer: Any, distinct: int | None = None):
        """`distinct`: so many traces are made, which may be those of any of the problems."""
        random, outputs = Random(0), outputs_of_models()
        self.tokenizer, self.tokens = tokenizer, tokens
        self.problems = [
            Problem(f"p{i}", f"Problem {i}: what is it?", Reference(outputs[i % len(outputs)][0]), "42")
            for i in range(1 + (traces - 1) // GROUP)
        ]
        self.traces = [self._trace(random, outputs[i // GROUP % len(outputs)], i) for i in range(distinct or traces)]
        # The steps' titles make a trace longer than `tokens`.
        self.longest = max(len(trace.token_ids) for trace in self.traces)
        answers = [text for found in outputs for text in found[1::2]]
        self.answers = ["".join(random.choices(answers, k=4))[:ANSWER] + "\n\nScore: 4" for _ in range(64)]

    def replies(self) -> list[str]:
        """What the judge's server sends."""
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
    """A reply of /generate, as SGLang writes it."""
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
        command = [sys.executable, "-m", "exprl_megatron.benchmarks.paced_server", file.name, *options]
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
        """The client's."""
        started = time.perf_counter()
        written = await self._client.generate(*arguments, **options)
        if options["max_new_tokens"]:
            self.late_s.append(time.perf_counter() - started - JUDGE_DELAY_S)
        return written

    async def generate_all(self, *arguments: Any, **options: Any) -> Any:
        """The client's."""
        started = time.perf_counter()
        written = await self._client.generate_all(*arguments, **options)
        self.late_s.append(time.perf_counter() - started - JUDGE_DELAY_S)
        return written


async def sampled(load: Load, policy: SGLangClient, grade: Grade) -> list[GradedTrace]:
    """The load's traces as a step samples them; each is graded when it is there."""
    graded: list[GradedTrace] = []
    problems = {problem.id: problem for problem in load.problems}

    async def take(trace: Trace) -> None:
        graded.append(await grade(problems[trace.problem_id], trace))

    await sample_groups(
        FixedServers([policy]),
        [Prompt(problem.id, [1] * 256) for problem in load.problems[:-1]],
        GROUP,
        SamplingConfig(max_new_tokens=load.longest),
        lambda problem, sample: sample,
        weight_versions=["v"],
        on_trace=take,
    )
    return graded


async def judged(load: Load, model: str, judge_url: str, policy_url: str | None, store: Path) -> dict[str, float]:
    """All of the load, as training grades it; the traces come from the policy's server where there is one."""
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
            await grade(load.problems[-1], load.traces[-1])
            lag.take(), timed.late_s.clear()
            busy[0] = 0.0

            cpu, wall = time.process_time(), time.perf_counter()
            if policy_url is None:
                graded = await asyncio.gather(
                    *(grade(load.problems[trace.sample // GROUP], trace) for trace in load.traces[:-1])
                )
            else:
                graded = await sampled(load, policy, grade)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    lag.stop()
    watching.cancel()
    assert {len(found.segments) for found in graded} == {SEGMENTS}
    late = sorted(timed.late_s)
    return {
        "traces": len(graded),
        "tokens": sum(len(found.trace.token_ids) for found in graded) / len(graded),
        "cpu_ms_a_trace": cpu / len(graded) * 1e3,
        "seconds": wall,
        "lag_max_s": lag.take(),
        "loop_busy_max_s": busy[0],
        "late_median_s": late[len(late) // 2],
        "late_p99_s": late[len(late) * 99 // 100],
        "late_max_s": late[-1],
    }


def bench_prefixes(args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """See the module."""
    load = Load(args.traces + 1, args.tokens, _tokenizer(args.model))
    backend = load.tokenizer.backend_tokenizer
    started = time.process_time()
    for trace in load.traces:
        backend.encode_batch_fast([trace.text], add_special_tokens=False)
    tokenizer_ms = (time.process_time() - started) / len(load.traces) * 1e3
    answers = load.replies()
    with paced_server(answers, "--delay", str(JUDGE_DELAY_S)) as url:
        figures = asyncio.run(judged(load, args.model, url, None, directory / "s.sqlite"))
    figures |= {"tokenizer_ms_a_trace": tokenizer_ms, "of_tokenizer": figures["cpu_ms_a_trace"] / tokenizer_ms}
    return figures | {"cpu_s_2048_traces": figures["cpu_ms_a_trace"] * 2.048}


def bench_loop(args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """See the module."""
    groups = -(-args.traces // GROUP)
    count = groups * GROUP
    load = Load(count + 1, args.tokens, _tokenizer(args.model), min(count, DISTINCT) + 1)
    bodies = [reply(trace.text, trace.token_ids.tolist(), log_probs=True) for trace in load.traces[:-1]]
    answers = load.replies()
    with (
        paced_server(answers, "--delay", str(JUDGE_DELAY_S)) as judge,
        paced_server(bodies, "--over", str(args.seconds), "--replies", str(count)) as policy,
    ):
        figures = asyncio.run(judged(load, args.model, judge, policy, directory / "s.sqlite"))
    return figures | {"replies_over_s": args.seconds, "host_threads": HOST_THREADS}


def bench_store(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """See the module."""
    random, outputs, path = Random(0), outputs_of_models(), directory / "s.sqlite"
    system = shipped_prompt("math", "prefix", "reference").system
    found: dict[str, Any] = {"rows": [], "bytes_a_row": [], "keep_ms": [], "find_ms": [], "newest_ms": []}
    real = rows = 0
    with JudgementStore(path) as store:
        for target in (args.rows // 1000, args.rows // 100, args.rows // 10, args.rows):
            before, started = real, time.process_time()
            while real - before < REAL_ROWS:
                real = _keep_problem(store, random, random.choice(outputs), system, real)
            found["keep_ms"].append((time.process_time() - started) / (real - before) * 1e3)
            rows += real - before
            if rows < target:
                _copy_rows(store, target - rows)
                rows = target
            keys = [_key(random.randrange(real)) for _ in range(500)]
            started = time.process_time()
            assert None not in store.find_judgements(keys)
            found["find_ms"].append((time.process_time() - started) / 500 * 1e3)
            started = time.process_time()
            store.newest(20)
            found["newest_ms"].append((time.process_time() - started) * 1e3)
            found["rows"].append(rows)
            store._writer.run("PRAGMA wal_checkpoint(TRUNCATE)")
            found["bytes_a_row"].append(path.stat().st_size / rows)
    return found


def _copy_rows(store: JudgementStore, count: int) -> None:
    """Copies of the store's first rows and of their traces, under keys of their own."""
    columns = "frame, trace, shown, answer, value, reason, evidence, created"
    with store._writer.lock:
        rows = store._writer.run(f"SELECT {columns} FROM judgements LIMIT 160")
        texts = store._writer.run("SELECT base, data FROM texts WHERE base IS NOT NULL LIMIT 16")
        insert = store._writer.connection.executemany
        for first in range(0, count, 10_000):
            size = min(10_000, count - first)
            store._writer.run("BEGIN IMMEDIATE")
            insert(
                "INSERT INTO texts (hash, base, data) VALUES (randomblob(32), ?, ?)",
                (texts[i % len(texts)] for i in range(size // SEGMENTS)),
            )
            insert(
                f"INSERT INTO judgements (key, {columns}) VALUES (randomblob(32), ?, ?, ?, ?, ?, ?, ?, ?)",
                (rows[i % len(rows)] for i in range(size)),
            )
            store._writer.run("COMMIT")


def _keep_problem(store: JudgementStore, random: Random, outputs: list[str], system: str, row: int) -> int:
    """Sixteen traces of a problem in ten beginnings each; the number of rows then."""
    question = [outputs[0] + str(row), "</trace>"]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    frame = json.dumps({"problem": f"p{row}", "messages": messages}).encode()
    written = []
    for _ in range(GROUP):
        text = f"{row} " + "\n\n".join(random.choices(outputs[::2], k=40))[:23_100]
        for prefix in range(1, SEGMENTS + 1):
            answer = "".join(random.choices(outputs[1::2], k=4))[:ANSWER]
            asked = Asked(frame, text, prefix * len(text) // SEGMENTS)
            written.append(store.keep_judgement_soon(_key(row), asked, answer, Scored(0.75, answer)))
            row += 1
    for future in written:
        future.result()
    return row


def _key(row: int) -> str:
    return content_key("judgement", row=row)


def _tokenizer(model: str | None) -> Any:
    return AutoTokenizer.from_pretrained(model)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefixes", "loop", "store"))
    parser.add_argument("--traces", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--model", default="build/smollm2-135m-instruct", help="has a tokenizer and weights")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    bench = {"prefixes": bench_prefixes, "loop": bench_loop, "store": bench_store}[args.what]
    with tempfile.TemporaryDirectory() as directory:
        figures = bench(args, Path(directory))
    for name, value in figures.items():
        shown = ", ".join(f"{each:,.4g}" for each in value) if isinstance(value, list) else f"{value:,.4g}"
        print(f"{name:>24}: {shown}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
