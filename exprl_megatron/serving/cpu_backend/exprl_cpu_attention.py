"""Attention of a whole batch at a time, in place of SGLang's loop over requests (its backend `torch_native`).

New tokens of several requests, padded to the longest, attend to their cached keys under one mask. Requests of similar
length are computed together, in pieces of bounded memory; the tokens of a prompt that follow cached ones are cut into
several where their mask would be larger. Where a prompt begins with cached tokens, only the new ones are queries, while
SGLang computes all. A request that is alone, and what this does not cover, is left to SGLang.

What a decoding step computes together, and where it is in the caches, is the same in all layers: it is planned in the
first one (PLANS, on SGLang's backend; `forget_plans` runs before every forward pass).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

PIECE = 2**19
"""Numbers that a piece holds at most in gathered keys, gathered values and its mask (2 MiB in fp32)."""
PADDING = 2**15
"""Numbers that a request is padded by at most: computing with them takes as long as a call of its own."""


@dataclass(frozen=True)
class Job:
    """Successive new tokens of one request, each of which sees itself and all before it."""

    pool: int
    """The request's row in SGLang's table of cache places."""
    first: int
    """Of its tokens among the batch's queries."""
    count: int
    length: int
    """Cached tokens that the last of them sees, itself included."""


@dataclass(frozen=True)
class Batch:
    """SGLang's tensors: `query` and `output` [tokens, heads, width], caches [places, kv heads, width]."""

    query: torch.Tensor
    output: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor
    """[pools, longest context]: where each token of a request is in the caches."""
    scaling: float | None

    @property
    def share(self) -> int:
        """Query heads that share a key."""
        return self.query.shape[1] // self.keys.shape[1]

    @property
    def cached(self) -> int:
        """The numbers of a token in both caches."""
        return sum(cache.shape[1] * cache.shape[2] for cache in (self.keys, self.values))


@dataclass(frozen=True)
class DecodePiece:
    """One new token of each of several requests."""

    rows: torch.Tensor
    """[requests]: where the requests are in the batch."""
    places: torch.Tensor
    """[requests * longest]: of their tokens in the caches; behind the end of a request any place."""
    mask: torch.Tensor
    """[requests, 1, 1, longest]: 0 at a request's tokens, minus infinity behind them; in the queries' format."""


@dataclass(frozen=True)
class DecodePlan:
    """All pieces of a decoding step, for layers whose caches have the same shape."""

    pools: torch.Tensor
    lengths: torch.Tensor
    pieces: list[DecodePiece]

    def is_of(self, pools: torch.Tensor, lengths: torch.Tensor) -> bool:
        """Return whether these are the requests that it was made for."""
        return torch.equal(self.pools, pools) and torch.equal(self.lengths, lengths)


PLANS = "exprl_decode_plans"
"""SGLang's backend has the plans of the present forward pass by this name, each by the shape of a layer's caches."""


def forget_plans(backend, *_, **__) -> None:
    """Clear the plans before each forward pass: SGLang calls init_forward_metadata once for each."""
    setattr(backend, PLANS, {})


def decode(original: Callable, backend, *tensors, scaling: float | None = None, **settings) -> torch.Tensor:
    """Replace TorchNativeAttnBackend._run_sdpa_forward_decode: one new token of each request."""
    query, output, keys, values, places, pools, lengths, encoder_lengths = tensors
    batch = Batch(query, output, keys, values, places, scaling)
    if len(lengths) == 1 or not _covers(batch, encoder_lengths, settings):
        return original(backend, *tensors, scaling=scaling, **settings)
    # Without a forward pass around it there is nothing that other layers could share.
    plans = getattr(backend, PLANS, {})
    key = (keys.shape[1:], values.shape[1:], batch.share, query.dtype)
    plan = plans.get(key)
    if plan is None or not plan.is_of(pools, lengths):
        plan = plans[key] = decode_plan(batch, pools, lengths)
    for piece in plan.pieces:
        _decode_together(batch, piece)
    return output


def decode_plan(batch: Batch, pools: torch.Tensor, lengths: torch.Tensor) -> DecodePlan:
    """Return what to compute together of one new token of each request; `pools` and `lengths` [requests]."""
    order = lengths.argsort(descending=True, stable=True)
    found = [_decode_piece(batch, rows, pools, lengths) for rows in order.split(piece_sizes(batch, lengths[order]))]
    return DecodePlan(pools.clone(), lengths.clone(), found)


def piece_sizes(batch: Batch, lengths: torch.Tensor) -> list[int]:
    """Return how many requests, longest first, each piece has: the rule of `pieces` for one new token of each."""
    numbers = _numbers(batch, 1, 1)
    falling = lengths.neg().tolist()
    sizes: list[int] = []
    first = 0
    while first < len(falling):
        longest = -falling[first]
        room = first + max(1, PIECE // (longest * numbers))
        last = bisect_right(falling, PADDING // numbers - longest, first, min(room, len(falling)))
        sizes.append(last - first)
        first = last
    return sizes


def _decode_piece(batch: Batch, rows: torch.Tensor, pools: torch.Tensor, lengths: torch.Tensor) -> DecodePiece:
    lengths = lengths[rows]
    longest = int(lengths[0])
    behind = torch.arange(longest) >= lengths[:, None]
    places = batch.places[pools[rows], :longest].masked_fill_(behind, 0)
    mask = torch.zeros(behind.shape, dtype=batch.query.dtype).masked_fill_(behind, -torch.inf)
    return DecodePiece(rows, places.flatten(), mask[:, None, None])


def _decode_together(batch: Batch, piece: DecodePiece) -> None:
    requests, longest = piece.mask.shape[0], piece.mask.shape[-1]
    keys, values = (
        cache.flatten(1).index_select(0, piece.places).view(requests, longest, *cache.shape[1:]).transpose(1, 2)
        for cache in (batch.keys, batch.values)
    )
    # Heads that share keys are further queries of one head: no key is copied for each of them.
    queries = batch.query.index_select(0, piece.rows).unflatten(1, (-1, batch.share))
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=piece.mask, scale=batch.scaling)
    batch.output.index_copy_(0, piece.rows, found.flatten(1, 2))


def extend(original: Callable, backend, *tensors, scaling: float | None = None, **settings) -> torch.Tensor:
    """Replace TorchNativeAttnBackend._run_sdpa_forward_extend: prompts, after their cached part."""
    query, output, keys, values, places, pools, lengths, prefixes, counts, encoder_lengths = tensors
    batch = Batch(query, output, keys, values, places, scaling)
    alone = len(lengths) == 1 and not prefixes.any()
    if alone or not settings["causal"] or not _covers(batch, encoder_lengths, settings):
        return original(backend, *tensors, scaling=scaling, **settings)
    jobs: list[Job] = []
    first = 0
    for pool, length, count in zip(pools.tolist(), lengths.tolist(), counts.tolist(), strict=True):
        jobs += _cut(batch, Job(pool, first, count, length))
        first += count
    return attend(batch, jobs)


def attend(batch: Batch, jobs: list[Job]) -> torch.Tensor:
    """Fill `batch.output` at the jobs' tokens; returns it."""
    for piece in pieces(batch, jobs):
        _attend_together(batch, piece)
    return batch.output


def pieces(batch: Batch, jobs: list[Job]) -> Iterator[list[Job]]:
    """Yield the jobs, joined where a piece has room and the padding costs less than a call of their own."""
    waiting = sorted((job for job in jobs if job.count), key=lambda job: (job.count, job.length), reverse=True)
    piece: list[Job] = []
    longest = least = 0
    for job in waiting:
        needs = _numbers(batch, job.length, job.count)
        if piece:
            count, length = piece[0].count, max(longest, job.length)
            padded = _numbers(batch, length, count)
            if (
                _is_prompt(job) == _is_prompt(piece[0])
                and (len(piece) + 1) * padded <= PIECE
                and padded - min(least, needs) <= PADDING
            ):
                piece.append(job)
                longest, least = length, min(least, needs)
                continue
            yield piece
        piece, longest, least = [job], job.length, needs
    if piece:
        yield piece


def _is_prompt(job: Job) -> bool:
    """Return whether its first token is the request's first: then a mask need not be made."""
    return job.count == job.length


def _numbers(batch: Batch, length: int, count: int) -> int:
    """Return what one request takes of a piece: its keys and values, and the mask of its queries."""
    return length * (batch.cached + count * batch.share)


def _cut(batch: Batch, job: Job) -> list[Job]:
    """Return the job as several whose masks each have room in a piece; a prompt without cached tokens needs no mask."""
    most = max(1, PIECE // (job.length * batch.share))
    if _is_prompt(job) or job.count <= most:
        return [job]
    cached = job.length - job.count
    return [
        Job(job.pool, job.first + begin, min(most, job.count - begin), cached + min(begin + most, job.count))
        for begin in range(0, job.count, most)
    ]


def _attend_together(batch: Batch, jobs: list[Job]) -> None:
    count, length = jobs[0].count, max(job.length for job in jobs)
    firsts, counts, lengths = (
        torch.tensor([getattr(job, name) for job in jobs])[:, None] for name in ("first", "count", "length")
    )
    real = torch.arange(count) < counts
    # Padding repeats a request's first query, and sees what that sees: nothing becomes infinite, and it is thrown away.
    steps = torch.where(real, torch.arange(count), 0)
    rows = firsts + steps
    places = batch.places[[job.pool for job in jobs], :length].masked_fill(torch.arange(length) >= lengths, 0)
    keys, values = (_gathered(cache, places) for cache in (batch.keys, batch.values))
    # [requests, heads, queries, width]
    queries = batch.query[rows].transpose(1, 2)
    if _is_prompt(jobs[0]):
        found = scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=batch.scaling, enable_gqa=batch.share > 1
        )
    else:
        found = _masked(queries, keys, values, lengths - counts + steps, batch.scaling)
    batch.output[rows[real]] = found.transpose(1, 2)[real]


def _masked(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scaling
) -> torch.Tensor:
    """Compute attention of queries that see the keys up to number `seen` [requests, queries]."""
    share, count = queries.shape[1] // keys.shape[1], queries.shape[2]
    visible = torch.arange(keys.shape[2]) <= seen[..., None]
    # Heads that share keys are further queries of one head: no key is copied for each of them.
    queries = queries.unflatten(1, (-1, share)).flatten(2, 3)
    mask = visible[:, None, None].expand(-1, 1, share if count > 1 else 1, -1, -1).flatten(2, 3)
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    return found.unflatten(2, (share, count)).flatten(1, 2)


def _gathered(cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return [requests, kv heads, tokens, width] of the cache [places, kv heads, width]."""
    rows = cache.flatten(1).index_select(0, places.flatten())
    return rows.view(*places.shape, *cache.shape[1:]).transpose(1, 2)


def _covers(batch: Batch, encoder_lengths: torch.Tensor | None, settings: dict) -> bool:
    """Return whether this is plain attention of a decoder over its own cache, in one number format."""
    window = settings["sliding_window_size"]
    return (
        encoder_lengths is None
        and not settings["is_cross_attn"]
        and (window is None or window < 0)
        and batch.query.dtype == batch.keys.dtype == batch.values.dtype
        and batch.query.shape[1] % batch.keys.shape[1] == 0
    )
