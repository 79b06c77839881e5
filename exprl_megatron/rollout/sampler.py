"""Groups of traces from the policy's servers, each trace handed on as soon as it is finished."""

import hashlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.client import Generation, SGLangClient
from exprl_megatron.serving.servers import Servers
from exprl_megatron.utils.array_fields import ArrayFields
from exprl_megatron.utils.together import first_of, together


@dataclass(frozen=True, eq=False)
class Prompt(ArrayFields):
    """What the policy gets to read of one problem."""

    problem_id: str
    token_ids: np.ndarray
    """[tokens], int32; anything like an array may be given."""

    occurrence: int = 0
    """How often the problem was drawn before in the same step; its samples then differ from those."""

    def __post_init__(self) -> None:
        self._hold(np.int32, "token_ids")


def sample_seed(run_seed: int, stage: str, step: int, problem_id: str, k: int) -> int:
    """The seed of sample `k` of a problem: 31 bits of SHA-256 over all that tells it from any other sample."""
    key = repr((run_seed, stage, step, problem_id, k)).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


async def sample_groups(
    servers: Servers,
    prompts: Sequence[Prompt],
    group_size: int,
    sampling: SamplingConfig,
    seed_of: Callable[[str, int], int],
    *,
    weight_versions: Collection[str],
    on_trace: Callable[[Trace], Awaitable[None]] | None = None,
    wanted: int | None = None,
    counts: Callable[[list[Trace]], bool] = lambda traces: True,
    whole_groups: bool = False,
) -> list[list[Trace]]:
    """`group_size` traces of every prompt, in the order of `prompts` and of the samples.

    As soon as `wanted` groups (None: all) are through of which `counts` says so, the others are given up and missing.

    All groups are under way at once, each at one server, which reads the prompt once for all of them. A server
    that fails, ends a trace before its end, or writes it under other weights has failed at it; what becomes of that is
    up to `servers`. `seed_of(problem_id, k)` seeds sample k, counted over all occurrences of the problem. `on_trace` is
    awaited for each trace when it is finished, while others are still being written; the call returns when all of these
    have returned too.

    With `whole_groups` one request asks for all traces of a group, which then are finished together: that is less work
    than a request for each, but the first ones wait for the longest.

    The first failure, of `servers` or of `on_trace`, cancels everything else and is raised as it is. Tokens must be of
    one of `weight_versions`, as they are when their trace is finished: whoever changes the weights of servers in
    mid-generation names the new ones there first.
    """

    def seed(prompt: Prompt, k: int) -> int:
        return seed_of(prompt.problem_id, k + prompt.occurrence * group_size)

    async def written(client: SGLangClient, prompt: Prompt, k: int) -> Trace:
        generation = await client.generate(prompt.token_ids, seed=seed(prompt, k), **sampling.model_dump())
        return _trace(client, prompt, k, generation, weight_versions)

    async def all_written(client: SGLangClient, prompt: Prompt) -> list[Trace]:
        seeds = [seed(prompt, k) for k in range(group_size)]
        generations = await client.generate_all([prompt.token_ids] * group_size, seeds, **sampling.model_dump())
        return [_trace(client, prompt, k, generation, weight_versions) for k, generation in enumerate(generations)]

    async def handed_on(trace: Trace) -> Trace:
        if on_trace is not None:
            await on_trace(trace)
        return trace

    async def one(home: int, prompt: Prompt, k: int) -> Trace:
        return await handed_on(await servers.ask(home, lambda client: written(client, prompt, k)))

    async def group(home: int, prompt: Prompt) -> list[Trace]:
        if group_size > 1:
            # Requests that come together are read together: none would find the prompt in the cache.
            await servers.ask(home, lambda client: client.read(prompt.token_ids))
        if whole_groups:
            traces = await servers.ask(home, lambda client: all_written(client, prompt))
            return await together([handed_on(trace) for trace in traces])
        return await together([one(home, prompt, k) for k in range(group_size)])

    groups = (group(i, prompt) for i, prompt in enumerate(prompts))
    return await first_of(groups, len(prompts) if wanted is None else wanted, counts)


def _trace(
    client: SGLangClient, prompt: Prompt, k: int, generation: Generation, weight_versions: Collection[str]
) -> Trace:
    if generation.finish_reason not in ("stop", "length"):
        raise ServerError(
            f"{client.name} ({client.url}) ended sample {k} of problem {prompt.problem_id} with "
            f"{generation.finish_reason!r} after {len(generation.token_ids)} tokens."
        )
    versions = {version for version, _, _ in generation.weight_versions}
    if not versions or not versions <= set(weight_versions):
        raise ServerError(
            f"{client.name} ({client.url}) wrote sample {k} of problem {prompt.problem_id} under weight version "
            f"{', '.join(sorted(versions)) or 'none'}, not {' or '.join(weight_versions)}."
        )
    return Trace(
        problem_id=prompt.problem_id,
        sample=k,
        prompt_ids=prompt.token_ids,
        token_ids=generation.token_ids,
        log_probs=generation.log_probs,
        text=generation.text,
        finish_reason=generation.finish_reason,
        weight_versions=generation.weight_versions,
        cached_tokens=min(generation.cached_tokens, len(prompt.token_ids)),
    )
