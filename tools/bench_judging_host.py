"""What judging by prefixes takes of the host, without a model: processor time, the event loop's lag, bytes on disk.

`prefixes`: traces are cut, judged in ten beginnings each and stored, by the project's own grading, judge, client and
store; the judge is a process that sends prepared answers. Processor seconds of this process, all threads, and as a
multiple of what the tokenizer alone takes for each trace once (which the load of the machine changes alike).

`loop`: the same while replies of a policy, in whole groups, come in over some time. The longest lag of the event loop,
the processor time that its thread spent without a pause (which a loaded machine lengthens less), and by how much judge
answers were later here than they left the judge.

`store`: judgements on model outputs of CHAMP, then copies of them under other keys until the store has so many rows:
bytes a row, and milliseconds of processor time to keep one, to find one, and to list the newest.

    python tools/bench_judging_host.py prefixes [--traces 64] [--tokens 6000] [--model DIR] [--json F]
    python tools/bench_judging_host.py loop [--traces 256] [--tokens 16000] [--seconds 60] [--model DIR] [--json F]
    python tools/bench_judging_host.py store [--rows 20000] [--json F]
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.judging_load import (
    ANSWER,
    GROUP,
    JUDGE_DELAY_S,
    SEGMENTS,
    Load,
    judged,
    outputs_of_models,
    paced_server,
    reply,
)
from transformers import AutoTokenizer

from exprl_megatron.judging.content_key import content_key
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.judging.prompt import shipped_prompt
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.judging.store_rows import StoredQuestion
from exprl_megatron.training.loop_lag import HOST_THREADS
from exprl_megatron.utils.collector import collect_between_steps

REAL_ROWS = 320


def bench_prefixes(args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """See the module."""
    load = Load(args.traces, args.tokens, _tokenizer(args.model))
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
    count = -(-args.traces // GROUP) * GROUP
    load = Load(count, args.tokens, _tokenizer(args.model))
    bodies = [reply(trace.text, trace.token_ids.tolist(), log_probs=True) for trace in load.traces]
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
            asked = StoredQuestion(frame, text, prefix * len(text) // SEGMENTS)
            written.append(store.submit_judgements([(_key(row), asked, answer, Scored(0.75, answer))]))
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
    parser.add_argument("--model", default="build/smollm2-135m-instruct", help="directory with a tokenizer and weights")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    # As a trainer process does when it has imported its libraries.
    collect_between_steps()
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
