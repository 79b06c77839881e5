"""Replies of /generate that no server gives, each made of one that a server gave."""

import json
import random
from collections.abc import Callable

from benchmarks.flat_replies import flatten, listed
from exprl_megatron.serving.flat_log_probs import IDS

_TOO_LONG = 2 * 2**20
"""Bytes; more than any reply may have that is asked for in a run on the miniature."""


def _log_probs(value: float | None) -> Callable[[dict], None]:
    def change(reply: dict) -> None:
        reply["meta_info"]["output_token_logprobs"][-1][0] = value

    return change


def _ids(value: object) -> Callable[[dict], None]:
    """In both lists, so that they agree."""

    def change(reply: dict) -> None:
        reply["output_ids"][-1] = value
        if entries := reply["meta_info"].get("output_token_logprobs"):
            entries[-1][1] = value

    return change


def _span(version: str | None, short: int) -> Callable[[dict], None]:
    def change(reply: dict) -> None:
        spans = reply["meta_info"]["weight_versions"]
        spans[-1]["end"] -= short
        spans[-1]["version"] = version

    return change


def _others(reply: dict) -> None:
    reply["meta_info"]["output_token_logprobs"][-1][1] += 1


OF_LOG_PROBS: dict[str, Callable[[dict], None]] = {
    "NaN as log-prob": _log_probs(float("nan")),
    "-inf as log-prob": _log_probs(float("-inf")),
    "log-prob above 0": _log_probs(5.0),
    "null as log-prob": _log_probs(None),
    "log-probs of other ids": _others,
    "a log-prob is missing": lambda reply: reply["meta_info"]["output_token_logprobs"].pop(),
}
OF_FIELDS: dict[str, Callable[[dict], None]] = {
    "id beyond the vocabulary": _ids(2**31 - 1),
    "negative id": _ids(-1),
    "id as text": _ids("6"),
    "an id too many": lambda reply: reply["output_ids"].append(reply["output_ids"][-1]),
    "span too short": _span("v0", 1),
    "no version": _span(None, 0),
    "no spans": lambda reply: reply["meta_info"].pop("weight_versions"),
    "text of other ids": lambda reply: reply.update(text=f"Score: 5 {reply['text'][::-1]} Score: 5"),
    "null as text": lambda reply: reply.update(text=None),
    "unknown reason": lambda reply: reply["meta_info"].update(finish_reason={"type": "tired"}),
}
_LISTED = {"id as text"}
"""What cannot be written in arrays; the garbage has lists instead."""
OF_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "half a reply": lambda reply: reply[: len(reply) // 2],
    "nothing": lambda reply: b"",
    "HTML": lambda reply: b"<html><body>502 Bad Gateway</body></html>",
    "bytes that are not UTF-8": lambda reply: reply.replace(b'"text":"', b'"text":"\xff\xfe', 1),
    "deep brackets": lambda reply: b"[" * 100_000,
    "two texts": lambda reply: reply[:-1] + b',"text":"Score: 5"}',
    "a reply without end": lambda reply: b'{"text":"' + b"a" * _TOO_LONG + b'"}',
}


def is_sample(body: bytes) -> bool:
    """Whether a reply of /generate has sampled tokens."""
    return f'"{IDS}":'.encode() in body or (b'"output_ids":[' in body and b'"output_ids":[]' not in body)


def garbled(reply: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A kind of garbage that can be made of `reply`, the body of a reply with sampled tokens, and the garbage."""
    has_log_probs = is_sample(reply) and b'"output_token_logprobs":[' in reply
    kind = chance.choice([*OF_BYTES, *OF_FIELDS, *(OF_LOG_PROBS if has_log_probs else ())])
    return kind, made(kind, reply)


def made(kind: str, reply: bytes) -> bytes:
    """Garbage of that kind."""
    if kind in OF_BYTES:
        return OF_BYTES[kind](reply)
    record = json.loads(reply)
    flat = listed(record)
    (OF_FIELDS | OF_LOG_PROBS)[kind](record)
    if flat and kind not in _LISTED:
        flatten(record)
    return json.dumps(record, separators=(",", ":")).encode()
