"""Samples groups of traces from the policy's servers; each trace is delivered as soon as it is finished."""

import hashlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.models.routing import Routing
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.generation import Generation
from exprl_megatron.serving.static_pool import SamplingServers
from exprl_megatron.utils.array_fields import ArrayFields
from exprl_megatron.utils.loop_throttle import LoopThrottle
from exprl_megatron.utils.together import first_n, gather_or_cancel

MAX_STARTS_PER_PASS = 16
"""Most requests that start in one pass of the event loop, at half a millisecond each: a step may have thousands."""
_LONG_PASS_S = 0.01
"""After a longer pass, in seconds, fewer requests start in the next one: a judge's answer takes several passes."""


@dataclass(frozen=True, eq=False)
class Prompt(ArrayFields):
    """The token ids of one problem's prompt."""

    problem_id: str
    token_ids: np.ndarray
    """[tokens], int32; array-likes are converted."""

    occurrence: int = 0
    """How often the problem was drawn before in the same step; each occurrence has different seeds."""

    def __post_init__(self) -> None:
        self._hold(np.int32, "token_ids")


def sample_seed(run_seed: int, stage: str, step: int, problem_id: str, k: int) -> int:
    """Compute the seed of sample `k` of a problem: 31 bits of SHA-256 over everything that identifies the sample."""
    key = repr((run_seed, stage, step, problem_id, k)).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


async def sample_groups(
    servers: SamplingServers,
    prompts: Sequence[Prompt],
    group_size: int,
    sampling: SamplingConfig,
    seed_of: Callable[[str, int], int],
    *,
    weight_versions: Collection[str],
    on_trace: Callable[[Trace], Awaitable[None]] | None = None,
    target_groups: int | None = None,
    accept_fn: Callable[[list[Trace]], bool] = lambda traces: True,
    group_requests: bool = False,
    routing: Routing | None = None,
) -> list[list[Trace]]:
    """Sample `group_size` traces of every prompt.

    All groups are in flight at the same time. A group stays on one server, which prefills the prompt once for all its
    traces. The first exception of `servers` or of `on_trace` cancels everything else and propagates.

    Args:
        servers: the sampling servers.
        prompts: the prompt of each group.
        group_size: traces per prompt.
        sampling: parameters of each request.
        seed_of: returns the seed of sample k of a problem, counted over all its occurrences.
        weight_versions: at the time when a trace is finished, each of its tokens must come from one of these versions.
            A caller that updates the servers' weights in mid-generation adds the new version first.
        on_trace: awaited for each finished trace while other traces are still being generated.
        target_groups: number of accepted groups after which the other groups are canceled; None: all.
        accept_fn: whether a group counts toward `target_groups`.
        group_requests: send one request for all traces of a group, which then finish together. That is less work than
            one request for each trace, but the first traces wait for the longest one.
        routing: the model's routing, where traces need the experts that the server chose.

    Returns:
        One list of traces for each group that was not canceled, in the order of `prompts`.

    Raises:
        ServerError: a server fails, ends a trace early, or samples it under other weights, and `servers` does not
            retry the request.

    More than 7 parameters: the sampling, and its control by the caller while it runs.
    """

    arguments = sampling.model_dump() | ({} if routing is None else {"routing": routing})

    def seed(prompt: Prompt, k: int) -> int:
        return seed_of(prompt.problem_id, k + prompt.occurrence * group_size)

    async def generate(client: SGLangClient, prompt: Prompt, k: int) -> Trace:
        generation = await client.generate(prompt.token_ids, seed=seed(prompt, k), **arguments)
        return _trace(client, prompt, k, generation, weight_versions)

    async def generate_group(client: SGLangClient, prompt: Prompt) -> list[Trace]:
        seeds = [seed(prompt, k) for k in range(group_size)]
        generations = await client.generate_all([prompt.token_ids] * group_size, seeds, **arguments)
        return [_trace(client, prompt, k, generation, weight_versions) for k, generation in enumerate(generations)]

    async def deliver(trace: Trace) -> Trace:
        if on_trace is not None:
            await on_trace(trace)
        return trace

    async def sample_one(home: int, prompt: Prompt, k: int) -> Trace:
        await starts.take()
        return await deliver(await servers.ask(home, lambda client: generate(client, prompt, k)))

    async def sample_group(home: int, prompt: Prompt) -> list[Trace]:
        if group_size > 1:
            await starts.take()
            # Requests that arrive together are prefilled together, and none of them finds the prompt in the cache.
            await servers.ask(home, lambda client: client.prefill(prompt.token_ids))
        if group_requests:
            traces = await servers.ask(home, lambda client: generate_group(client, prompt))
            return await gather_or_cancel([deliver(trace) for trace in traces])
        return await gather_or_cancel([sample_one(home, prompt, k) for k in range(group_size)])

    starts = LoopThrottle(MAX_STARTS_PER_PASS, _LONG_PASS_S)
    groups = (sample_group(i, prompt) for i, prompt in enumerate(prompts))
    return await first_n(groups, len(prompts) if target_groups is None else target_groups, accept_fn)


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
            f"{client.name} ({client.url}) sampled trace {k} of problem {prompt.problem_id} under weight version "
            f"{', '.join(sorted(versions)) or 'none'}, not {' or '.join(weight_versions)}."
        )
    tokens = len(prompt.token_ids) + len(generation.token_ids)
    if generation.routed_experts is not None and len(generation.routed_experts) != tokens - 1:
        raise ServerError(
            f"{client.name} ({client.url}) returned the experts of {len(generation.routed_experts)} tokens for sample "
            f"{k} of problem {prompt.problem_id}, whose {tokens} tokens have {tokens - 1}."
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
        routed_experts=generation.routed_experts,
    )
