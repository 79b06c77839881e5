"""The same requests to one server through our client and through SGLang's own `bench_serving`, and their cost to us."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keys import authorization, read_key
from exprl_megatron.serving.server_command import server_environment
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.together import gather_or_cancel

_SEED = 42
_SAMPLING_SEED = 1


@dataclass(frozen=True)
class Load:
    """`requests` prompts of random ids, all sent at once."""

    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def sampling(self) -> SamplingConfig:
        """Of every request."""
        return SamplingConfig(max_new_tokens=self.output_tokens)

    def prompts(self, model: Path) -> list[list[int]]:
        """Return the token ids that `bench_serving` makes of the same numbers and its `--seed`."""
        # Imported here: the memory of a process that only sends shall be the client's.
        from sglang.benchmark.datasets.random import sample_random_requests
        from transformers import AutoTokenizer

        random.seed(_SEED)
        np.random.seed(_SEED)
        rows = sample_random_requests(
            self.input_tokens,
            self.output_tokens,
            self.requests,
            1.0,
            AutoTokenizer.from_pretrained(model),
            "",
            random_sample=False,
            return_text=False,
        )
        return [row.prompt for row in rows]


@dataclass(frozen=True)
class ServedModel:
    """What became of a load."""

    seconds: float
    requests: int
    output_tokens: int
    """As its sender counts them: `bench_serving` takes an answer without text for one of full length."""

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True)
class Place:
    """A server, and the file with its key."""

    url: str
    key_file: str


async def through_our_client(server: Place, prompts: list[list[int]], sampling: SamplingConfig) -> ServedModel:
    """Return all prompts at once, as a step's traces are sampled. Raises ServerError."""
    key = authorization(server.key_file)
    async with SGLangClient(server.url, "server", deadline_s=3600.0, headers=key) as client:
        started = time.perf_counter()
        generations = await gather_or_cancel(
            client.generate(prompt, seed=_SAMPLING_SEED, **sampling.model_dump()) for prompt in prompts
        )
        seconds = time.perf_counter() - started
    return ServedModel(seconds, len(generations), sum(len(generation.token_ids) for generation in generations))


def through_bench_serving(server: Place, model: Path, load: Load, stream: bool, directory: Path) -> ServedModel:
    """Return the same in a process of `sglang.bench_serving`; `stream` is its default. Raises RunStopped where it
    fails.
    """
    result = directory / f"bench_serving-{time.monotonic_ns()}.jsonl"
    sampling = load.sampling.model_dump() | {"sampling_seed": _SAMPLING_SEED}
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", server.url]
    command += ["--model", str(model), "--tokenizer", str(model), "--dataset-name", "random-ids", "--tokenize-prompt"]
    command += ["--num-prompts", str(load.requests), "--random-input-len", str(load.input_tokens)]
    command += ["--random-output-len", str(load.output_tokens), "--random-range-ratio", "1.0"]
    command += ["--extra-request-body", json.dumps({"sampling_params": sampling}), "--return-logprob"]
    command += ["--seed", str(_SEED), "--warmup-requests", "0", "--disable-tqdm", "--output-file", str(result)]
    command += ["--output-details", *([] if stream else ["--disable-stream"])]
    environment = server_environment(os.environ, cuda=uses_cuda(), tp=1) | {"OPENAI_API_KEY": read_key(server.key_file)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode or not result.is_file():
        raise RunStopped(f"sglang.bench_serving ended with status {ended.returncode}: {ended.stderr.strip()[-1500:]}")
    found = json.loads(result.read_text().splitlines()[-1])
    if found["completed"] != load.requests:
        raise RunStopped(f"sglang.bench_serving had {found['completed']} of {load.requests} requests answered.")
    return ServedModel(found["duration"], found["completed"], sum(found["output_lens"]))


def peak_of_in_flight(server: Place, prompts: list[list[int]], sampling: SamplingConfig) -> dict[str, float]:
    """Return megabytes (1e6) that this process grew by during the load, at its peak; call in a fresh process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _peak_mb()
    served = asyncio.run(through_our_client(server, prompts, sampling))
    return {
        "requests": served.requests,
        "seconds": served.seconds,
        "grown_mb": _peak_mb() - before,
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    """Not getrusage: a process inherits the maximum of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
