"""What SGLang's /generate answers, from the bytes of the reply to arrays, which are checked.

A server that we start sends log-probs as arrays in base64 (see flat_log_probs.py). SGLang's own reply of n tokens is
some 46 n bytes, most of them the list `output_token_logprobs` of [log-prob, id, null]. Either is cut out of the reply
by its key, which no JSON string can hold unescaped, and a list's numbers are parsed where they are (see
reply_arrays.py); the rest is decoded as typed structs. A reply in any other form is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np

from exprl_megatron.models.routing import Routing
from exprl_megatron.serving.flat_log_probs import cut_flat_log_probs
from exprl_megatron.serving.reply_arrays import (
    INPUT_LOG_PROBS,
    OUTPUT_IDS,
    OUTPUT_LOG_PROBS,
    cut_list,
    id_list,
    is_empty_list,
    log_prob_entries,
    refuse_repeats,
)
from exprl_megatron.serving.routed_experts import cut_routed_experts, read_routed_experts
from exprl_megatron.utils.text_check import TextCheck

_FIELDS = tuple(
    f'"{name}":'.encode() for name in ("text", "meta_info", "finish_reason", "weight_version", "weight_versions")
)
"""What a reply may have once; a JSON string cannot hold these bytes."""
LOG_PROB_ROUNDING = 1e-3
"""Log-probs of certain tokens may come out this little above 0."""


@dataclass(frozen=True, eq=False)
class Generation:
    """One sampled continuation, as /generate returned it."""

    token_ids: np.ndarray
    """[tokens], int32."""
    log_probs: np.ndarray
    """[tokens], float32: natural log, at the sampling temperature, before top-p and top-k; empty if not asked for."""
    text: str
    finish_reason: str
    """`stop`, `length` or `abort`."""
    weight_versions: tuple[tuple[str, int, int], ...]
    """(version, first output token, one past the last) for each stretch of output tokens."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the radix cache already held."""
    watched_log_probs: tuple[tuple[float, ...], ...] = ()
    """At the place of each output token the log-probs of `watched_ids`, in that order; empty where none were asked."""
    routed_experts: np.ndarray | None = None
    """[prompt + output tokens - 1, layers, top_k], uint8 or int16: which experts the server chose; None: not asked."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probs of given tokens, as /generate returned them."""

    log_probs: np.ndarray
    """[tokens], float32: natural log, at temperature 1."""
    weight_version: str


@dataclass(frozen=True)
class ExpectedReply:
    """The request of /generate that a reply is checked against."""

    max_new_tokens: int | None = None
    vocabulary: int | None = None
    """How many token ids the model has; None: any id is taken."""
    log_probs: bool = True
    watched_ids: tuple[int, ...] = ()
    text_check: TextCheck | None = None
    """Of the model; None: any text is taken."""
    routing: Routing | None = None
    """The shape of the choice of experts that was asked for, if any was."""


_ANYTHING = ExpectedReply()
_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Finish(msgspec.Struct):
    type: Literal["stop", "length", "abort"]


class _Span(msgspec.Struct):
    version: str
    start: _Count
    end: _Count


class _Meta(msgspec.Struct):
    finish_reason: _Finish
    prompt_tokens: _Count = 0
    cached_tokens: _Count = 0
    weight_version: str | None = None
    weight_versions: list[_Span] | None = None
    output_token_ids_logprobs: list[list[tuple[float, int, str | None]]] | None = None
    routed_experts: str | None = None
    """Has been cut out where it was asked for."""


class _Reply(msgspec.Struct):
    text: str
    meta_info: _Meta
    output_ids: msgspec.Raw


class _ScoresReply(msgspec.Struct):
    meta_info: _Meta


_REPLY = msgspec.json.Decoder(_Reply)
_REPLIES = msgspec.json.Decoder(list[msgspec.Raw])
_SCORES_REPLY = msgspec.json.Decoder(_ScoresReply)


def reply_limit(tokens: int, watched: int = 0) -> int:
    """Return the bytes that a reply about `tokens` tokens may have, with the log-probs of `watched` ids at each of
    them.

    A token is some 50 bytes of log-prob and id, and up to 128 characters of text, each up to 6 bytes in JSON.
    """
    return 65_536 + tokens * (1024 + 64 * watched)


def read_generation(body: bytes, asked: ExpectedReply = _ANYTHING) -> Generation:
    """Return the continuation that a reply of /generate holds.

    Raises:
        ValueError: its form is not SGLang's (the error names the field), a log-prob is missing, not finite or above 0,
            an id is invalid or differs from the id of its log-prob, the numbers of ids and log-probs differ, the text
            is not that of the ids, or it is not what was `asked` for.
    """
    sent = None
    if asked.routing is not None:
        body, sent = cut_routed_experts(body)
    flat = None
    if asked.log_probs and is_empty_list(body, OUTPUT_LOG_PROBS):
        body, flat = cut_flat_log_probs(body)
    rest, block = cut_list(body, OUTPUT_LOG_PROBS)
    rest, ids = cut_list(rest, OUTPUT_IDS)
    refuse_repeats(rest, _FIELDS)
    reply = _REPLY.decode(rest)
    meta = reply.meta_info
    # A value that is not a list of numbers has not been cut out.
    token_ids = id_list(memoryview(reply.output_ids) if ids is None else ids, "output_ids")
    # An aborted request that was still waiting has no log-probs.
    log_probs, logged_ids = _listed_log_probs(block) if flat is None else flat
    if flat is not None and not len(token_ids):
        token_ids = _checked_ids(logged_ids)
    if asked.log_probs and len(log_probs) != len(token_ids):
        raise ValueError(f"{len(token_ids)} output_ids but {len(log_probs)} output_token_logprobs")
    _check_log_probs(log_probs, "output_token_logprobs")
    if len(log_probs) and not np.array_equal(logged_ids, token_ids):
        raise ValueError("output_token_logprobs has other ids than output_ids")
    _check_length(token_ids, asked, meta.finish_reason.type)
    if asked.text_check is not None:
        asked.text_check.check(token_ids, reply.text)
    if meta.finish_reason.type != "abort":
        if asked.log_probs and block is None:
            raise ValueError("output_token_logprobs is missing")
        _check_spans(meta.weight_versions, len(token_ids))
    watched = (meta.output_token_ids_logprobs or ()) if asked.watched_ids else ()
    if asked.watched_ids and meta.finish_reason.type != "abort":
        _check_watched(watched, len(token_ids), asked.watched_ids)
    experts = None
    if asked.routing is not None and meta.finish_reason.type != "abort":
        experts = read_routed_experts(sent, meta.prompt_tokens + len(token_ids), asked.routing)
    return Generation(
        token_ids=token_ids,
        log_probs=log_probs,
        text=reply.text,
        finish_reason=meta.finish_reason.type,
        weight_versions=tuple((span.version, span.start, span.end) for span in meta.weight_versions or ()),
        prompt_tokens=meta.prompt_tokens,
        cached_tokens=meta.cached_tokens,
        watched_log_probs=tuple(tuple(log_prob for log_prob, _, _ in entries) for entries in watched),
        routed_experts=experts,
    )


def _listed_log_probs(block: memoryview | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probs, float32 [tokens], and the ids, int32 [tokens], of the list of SGLang's own reply."""
    entries = log_prob_entries(block, "output_token_logprobs")
    return entries.log_probs(), entries.token_ids()


def _checked_ids(ids: np.ndarray) -> np.ndarray:
    """Return `ids`, int32 [tokens], of a reply that has them once, beside the flat log-probs."""
    if len(ids) and ids.min() < 0:
        raise ValueError(f"output_token_logprobs has an entry that is not an id, {ids.min()}")
    return ids


def _check_log_probs(log_probs: np.ndarray, field: str) -> None:
    """Raise ValueError where one of `log_probs`, float32 [tokens], is not finite or above 0."""
    if not np.isfinite(log_probs).all():
        raise ValueError(f"{field} has a log-prob that is not finite")
    if len(log_probs) and log_probs.max() > LOG_PROB_ROUNDING:
        raise ValueError(f"{field} has a log-prob above 0, {log_probs.max():g}")


def read_generations(body: bytes, asked: ExpectedReply, count: int) -> list[Generation]:
    """Return the `count` continuations that a reply to a request for several holds, in their order.

    Raises:
        ValueError: as read_generation does for any of them, and where there are not `count`.
    """
    replies = _REPLIES.decode(body)
    if len(replies) != count:
        raise ValueError(f"{len(replies)} continuations where {count} were asked for")
    return [read_generation(bytes(reply), asked) for reply in replies]


def _check_length(token_ids: np.ndarray, asked: ExpectedReply, reason: str) -> None:
    if asked.max_new_tokens and not len(token_ids) and reason != "abort":
        raise ValueError("output_ids is empty")
    if asked.max_new_tokens is not None and len(token_ids) > asked.max_new_tokens:
        raise ValueError(f"{len(token_ids)} output_ids where at most {asked.max_new_tokens} were asked for")
    if asked.vocabulary is not None and len(token_ids) and token_ids.max() >= asked.vocabulary:
        raise ValueError(f"output_ids has {token_ids.max()}, but the vocabulary has {asked.vocabulary} ids")


def _check_spans(spans: Sequence[_Span] | None, tokens: int) -> None:
    """Raise ValueError where the spans do not cover all tokens in order and without gaps."""
    if spans is None:
        raise ValueError("weight_versions is missing")
    end = 0
    for span in spans:
        if span.start != end or span.end < span.start:
            raise ValueError(f"weight_versions has a span from {span.start} to {span.end} after one to {end}")
        end = span.end
    if end != tokens:
        raise ValueError(f"weight_versions covers {end} tokens, but there are {tokens} output_ids")


def _check_watched(watched: Sequence[Sequence[tuple]], tokens: int, ids: tuple[int, ...]) -> None:
    """Raise ValueError where the log-probs of watched ids are not one for each of `ids` at each token."""
    field = "output_token_ids_logprobs"
    if len(watched) != tokens:
        raise ValueError(f"{field} is of {len(watched)} tokens, but there are {tokens} output_ids")
    for entries in watched:
        if tuple(token for _, token, _ in entries) != ids:
            raise ValueError(f"{field} is not of the {len(ids)} ids asked for")
        if not all(log_prob <= LOG_PROB_ROUNDING for log_prob, _, _ in entries):
            raise ValueError(f"{field} has a log-prob that is above 0 or not a number")


def read_scores(body: bytes, token_ids: Sequence[int] | np.ndarray) -> Scores:
    """Read the scores of `token_ids` (int [tokens]) from a reply of /generate, whose first entry belongs to the token
    before.

    Raises:
        ValueError: the reply is damaged (see read_generation), or is about other tokens.
    """
    rest, block = cut_list(body, INPUT_LOG_PROBS)
    refuse_repeats(rest, _FIELDS)
    meta = _SCORES_REPLY.decode(rest).meta_info
    if block is None or meta.weight_version is None:
        raise ValueError(f"{'input_token_logprobs' if block is None else 'weight_version'} is missing")
    # The log-prob of the first entry was not asked for and is null.
    block = memoryview(bytes(block).replace(b"[[null,", b"[[0,", 1))
    entries = log_prob_entries(block, "input_token_logprobs")
    ids = entries.token_ids()[1:]
    if not np.array_equal(ids, token_ids):
        raise ValueError(f"input_token_logprobs of {len(ids)} tokens that are not the {len(token_ids)} asked for")
    log_probs = entries.log_probs()
    _check_log_probs(log_probs, "input_token_logprobs")
    return Scores(log_probs[1:], meta.weight_version)
