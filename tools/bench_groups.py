"""What it saves that a group's prompt is read once, ahead of its traces: tokens that the server reads, and time.

Groups of traces of random prompts are sampled from one server with the miniature's policy, as in training and, in
turns, with all requests at once; the server's cache is emptied before each.

    python tools/bench_groups.py [--problems 32] [--group-size 16] [--prompt-tokens 256] [--new-tokens 64] [--json F]
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

from exprl_megatron.config.serving import SamplingConfig, ServerConfig
from exprl_megatron.rollout.sampler import Prompt, sample_groups
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.serving.static_pool import StaticPool

MODEL = Path(__file__).resolve().parent.parent / "recipes" / "miniature" / "policy"
VOCABULARY = 64
"""Tokens that prompts are made of; the model's vocabulary is larger."""


@dataclass(frozen=True)
class Figures:
    """Groups sampled once."""

    read_tokens: int
    seconds: float


async def sampled(client: SGLangClient, prompts: Sequence[Prompt], group_size: int, new_tokens: int) -> Figures:
    """Sample every prompt `group_size` times, from an empty cache."""
    await client.flush_cache()
    sampling = SamplingConfig(max_new_tokens=new_tokens)
    started = time.perf_counter()
    groups = await sample_groups(
        StaticPool([client]), prompts, group_size, sampling, lambda problem, k: k, weight_versions=["initial"]
    )
    seconds = time.perf_counter() - started
    ahead = sum(len(prompt.token_ids) for prompt in prompts) if group_size > 1 else 0
    read = sum(len(trace.prompt_ids) - trace.cached_tokens for group in groups for trace in group)
    return Figures(ahead + read, seconds)


async def compare(client: SGLangClient, args: argparse.Namespace) -> dict[str, list[Figures]]:
    """Return figures of both ways by round."""
    rng = Random(0)
    found: dict[str, list[Figures]] = {"ahead": [], "at once": []}
    async with client:
        for number in range(args.rounds + 1):
            prompts = [
                Prompt(f"p{i}", tuple(rng.randrange(VOCABULARY) for _ in range(args.prompt_tokens)))
                for i in range(args.problems)
            ]
            each = [prompt for prompt in prompts for _ in range(args.group_size)]
            ahead = await sampled(client, prompts, args.group_size, args.new_tokens)
            at_once = await sampled(client, each, 1, args.new_tokens)
            if number:  # the first round warms up
                found["ahead"].append(ahead)
                found["at once"].append(at_once)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        start_servers([ServerSpec("policy-0", MODEL, ServerConfig(), Path(directory))])[0] as server,
    ):
        found = asyncio.run(compare(server.client(), args))
    result = {}
    for name, figures in found.items():
        result[name] = {key: median(getattr(f, key) for f in figures) for key in ("read_tokens", "seconds")}
        print(f"{name:8} {result[name]['read_tokens']:>10,.0f} tokens read {result[name]['seconds']:8.2f} s (median)")
    ratios = {key: result["at once"][key] / result["ahead"][key] for key in result["ahead"]}
    print(f"ratio    {ratios['read_tokens']:>10.2f} {ratios['seconds']:>20.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(result | {"ratio": ratios}, indent=1))


if __name__ == "__main__":
    main()
