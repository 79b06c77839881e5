"""What it saves to put the trace last in a judge's prompt, and to have its longest prefix read before the others.

Some problems with a group of traces each are judged as in training, all at once and through the project's own judge:
whole traces, or every prefix of them. The order `upstream` (problem, trace, reference; all prefixes at once) and the
order `shared` (problem, reference, trace) take turns on one server, its cache emptied before each. Texts are random
words of the model's own vocabulary, which nothing but their beginnings makes alike. Answers are cut off after a few
tokens, so that reading is what takes the time; there are no verdicts, and the figures need none.

    python tools/bench_judging.py --model DIR [--json F]
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from transformers import AutoTokenizer

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judge_model import model_context
from exprl_megatron.judging.judgement import Judgement, Scored
from exprl_megatron.judging.prompt import prompt_set_hash
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.generation import Generation
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.utils.accelerator import uses_cuda

ROOT = Path(__file__).resolve().parent.parent
ORDERS = ("upstream", "shared")
ANSWER_TOKENS = 4


@dataclass(frozen=True)
class Figures:
    """One pass over all judgements."""

    order: str
    judgements: int
    prompt_tokens: int
    prefilled_tokens: int
    """Those that the cache did not hold."""
    seconds: float


class Meter:
    """A client that adds up what its requests had the server read."""

    def __init__(self, client: SGLangClient):
        self._client = client
        self.name, self.url = client.name, client.url
        self.prompt_tokens = self.cached_tokens = 0

    async def generate(self, *args, **settings) -> Generation:
        generation = await self._client.generate(*args, **settings)
        self.prompt_tokens += generation.prompt_tokens
        self.cached_tokens += generation.cached_tokens
        return generation

    async def health(self) -> None:
        await self._client.health()


def words_of(tokenizer) -> list[str]:
    """Return words of the vocabulary that are one token each."""
    texts = {tokenizer.decode([token]).strip() for token in set(tokenizer.get_vocab().values())}
    return sorted(text for text in texts if text.isascii() and text.isalnum())


def make_cases(rng: Random, words: list[str], args: argparse.Namespace) -> list[tuple[Problem, list[str]]]:
    """Problems, each with its traces."""

    def text(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    return [
        (
            Problem(f"p{i}", text(args.problem_words), Reference(text(args.reference_words))),
            [text(args.trace_words) for _ in range(args.traces)],
        )
        for i in range(args.problems)
    ]


def prefixes(trace: str, segments: int) -> list[str]:
    """Return the beginnings up to the end of each of `segments` equal segments; the last is the whole."""
    words = trace.split()
    return [" ".join(words[: len(words) * (i + 1) // segments]) for i in range(segments)]


async def verdicts(judge: Judge, order: str, problem: Problem, trace: str, segments: int | None) -> list[Judgement]:
    """On the whole trace, or on its prefixes: as in training, or with `upstream` all asked for at once."""
    if segments is None:
        return [await judge.grade(problem, trace)]
    texts = prefixes(trace, segments)
    if order == "shared":
        return await judge.grade_prefixes(problem, texts)
    return await asyncio.gather(*(judge.grade(problem, text, "prefix") for text in texts))


async def judged(judge: Judge, meter: Meter, order: str, cases: list, segments: int | None) -> Figures:
    """Judge whole traces, or all their prefixes where `segments` says how many."""
    started = time.perf_counter()
    each = await asyncio.gather(
        *(verdicts(judge, order, problem, trace, segments) for problem, traces in cases for trace in traces)
    )
    judgements = [judgement for several in each for judgement in several]
    seconds = time.perf_counter() - started
    failed = [judgement for judgement in judgements if not _answered(judgement)]
    if failed:
        sys.exit(f"{len(failed)} of {len(judgements)} judgements failed, the first with {failed[0]}")
    return Figures(order, len(judgements), meter.prompt_tokens, meter.prompt_tokens - meter.cached_tokens, seconds)


def _answered(judgement: Judgement) -> bool:
    return isinstance(judgement, Scored) or judgement.reason in ("unreadable", "out-of-range")


async def measured(client: SGLangClient, model: str, cases: list, args: argparse.Namespace) -> dict[str, list[Figures]]:
    """Return figures by unit; both orders in each repeat, first the one and then the other."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: dict[str, list[Figures]] = {"trace": [], "prefix": []}
    async with client:
        for repeat in range(args.repeats + 1):
            for granularity, segments in (("trace", None), ("prefix", args.segments)):
                for order in ORDERS if repeat % 2 else reversed(ORDERS):
                    # The same words in both orders.
                    prompts = {"prompt_order": order, "shipped_prompts": prompt_set_hash()}
                    config = JudgeConfig(model=model, **prompts, max_new_tokens=ANSWER_TOKENS, reasks=0)
                    meter = Meter(client)
                    judge = Judge(config, [meter], tokenizer)
                    await client.flush_cache()
                    figures = await judged(judge, meter, order, cases, segments)
                    if repeat:  # the first round warms up
                        found[granularity].append(figures)
    return found


def stretched(model: Path, positions: int, directory: Path) -> Path:
    """`model` as it is, or linked into `directory` with a context of `positions` where its own is shorter."""
    if model_context(str(model)) >= positions:
        return model
    for path in model.iterdir():
        if path.name != "config.json":
            (directory / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    print(f"{model} is served with a context of {positions}, more than it was made for; only time is measured.")
    return directory


def report(found: dict[str, list[Figures]]) -> dict:
    """Return medians by unit and order, and their ratios (upstream / shared); printed too."""
    result = {}
    for granularity, figures in found.items():
        upstream, shared = (_medians([f for f in figures if f.order == order]) for order in ORDERS)
        pairs = [[f.seconds for f in figures if f.order == order] for order in ORDERS]
        ratios = sorted(a / b for a, b in zip(*pairs, strict=True))
        tokens, seconds = (upstream[name] / shared[name] for name in ("prefilled_tokens", "seconds"))
        print(f"\n{granularity}: {shared['judgements']:.0f} judgements, {shared['prompt_tokens']:,.0f} prompt tokens")
        for order, medians in zip(ORDERS, (upstream, shared), strict=True):
            print(f"  {order:9} {medians['prefilled_tokens']:>10,.0f} tokens read {medians['seconds']:8.2f} s (median)")
        print(f"  ratio     {tokens:>10.2f}             {seconds:8.2f}   (pairs: {ratios[0]:.2f} to {ratios[-1]:.2f})")
        ratio = {"token_ratio": tokens, "time_ratio": seconds, "time_ratio_of_pairs": ratios}
        result[granularity] = {"upstream": upstream, "shared": shared, **ratio}
    return result


def _medians(figures: list[Figures]) -> dict[str, float]:
    names = ("judgements", "prompt_tokens", "prefilled_tokens", "seconds")
    return {name: statistics.median(getattr(f, name) for f in figures) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "recipes" / "miniature" / "judge")
    parser.add_argument("--problems", type=int, default=3)
    parser.add_argument("--traces", type=int, default=16, help="traces of each problem")
    parser.add_argument("--segments", type=int, default=8, help="prefixes of each trace")
    parser.add_argument("--problem-words", type=int, default=100)
    parser.add_argument("--reference-words", type=int, default=500)
    parser.add_argument("--trace-words", type=int, default=800)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-total-tokens", type=int, help="slots of the server's cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cases = make_cases(Random(args.seed), words_of(tokenizer), args)
    with tempfile.TemporaryDirectory() as directory:
        longest = max(
            len(Judge(JudgeConfig(model=str(args.model)), [], tokenizer).prompt_ids(problem, trace, "prefix"))
            for problem, traces in cases
            for trace in traces
        )
        linked = Path(directory) / "model"
        linked.mkdir()
        model = stretched(args.model, longest + 2 * ANSWER_TOKENS, linked)
        dtype = "bfloat16" if uses_cuda() else "float32"
        config = ServerConfig(max_total_tokens=args.max_total_tokens)
        spec = ServerSpec("judge-0", model, config, Path(directory) / "logs", dtype=dtype)
        with start_servers([spec])[0] as server:
            found = asyncio.run(measured(server.client(), str(model), cases, args))
    result = report(found)
    if args.json is not None:
        runs = {granularity: [asdict(f) for f in figures] for granularity, figures in found.items()}
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "result": result, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
