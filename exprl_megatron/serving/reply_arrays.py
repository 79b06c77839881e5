"""Arrays from lists of numbers in a JSON text, without a Python object for every token.

A list is cut out of the text by its key, which no JSON string can hold unescaped, and its numbers are parsed where they
are. Why not msgspec: it makes a Python object for every number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import pyarrow as pa

OUTPUT_LOG_PROBS, INPUT_LOG_PROBS = b'"output_token_logprobs":', b'"input_token_logprobs":'
OUTPUT_IDS = b'"output_ids":'
_OPEN, _COMMA, _QUOTE, _ZERO = ord("["), ord(","), b'"', ord("0")
_SPACE, _WHITESPACE = ord(" "), b" \t\r\n"
_SHORT_IDS = 4096
"""Bytes of a list of ids up to which Python's integers cost less than the calls of numpy and pyarrow."""
_ID_LIST = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]])


def is_empty_list(body: bytes, key: bytes) -> bool:
    """Return whether the value of `key` in the JSON text `body` is an empty list."""
    start = body.find(key) + len(key)
    return body[start : start + 2] == b"[]"


def cut_list(body: bytes, key: bytes) -> tuple[bytes, memoryview | None]:
    """Return `body` with an empty list for the value of `key`, and that value without white space; None: it has none.

    What is cut out begins behind the key and ends with a bracket, but may still be anything.

    Raises:
        ValueError: `key` is there more than once, or its entries are lists and the last one is not closed.
    """
    place = body.find(key)
    if place < 0:
        return body, None
    start = place + len(key)
    # No string is among the numbers: the list ends with the last bracket before the next one.
    quote = body.find(_QUOTE, start)
    end = body.rfind(b"]", start, len(body) if quote < 0 else quote) + 1
    if body.find(key, end or start) >= 0:
        refuse_repeats(body, (key,))
    if not end:
        return body, None
    if end == start + 2:
        return body, memoryview(b"[]")
    block = _dense(memoryview(body)[start:end])
    if key != OUTPUT_IDS and block != b"[]" and block[-2:] != b"]]":
        raise ValueError(f"{key.decode()} is not a list of [log-prob, id, null]")
    return body[:start] + b"[]" + body[end:], block


def refuse_repeats(body: bytes, fields: Sequence[bytes]) -> None:
    """Check that the JSON text `body` has each of `fields` (with quotes and colon) at most once.

    Raises:
        ValueError: it has one more often.
    """
    for field in fields:
        if (count := body.count(field)) > 1:
            raise ValueError(f"{field.decode().strip(':')} is there {count} times")


@dataclass(frozen=True)
class LogProbEntries:
    """A list `[[log-prob,id,null],...]` of `count` entries, and where the commas in it are."""

    block: memoryview
    commas: np.ndarray
    field: str

    def log_probs(self) -> np.ndarray:
        """Return the log-probs, [count], float32."""
        if not len(self.commas):
            return np.empty(0, np.float32)
        return _parsed(self.block, self._starts(), self.commas[0::3], pa.float32(), self.field)

    def token_ids(self) -> np.ndarray:
        """Return the token ids, [count], int32."""
        if not len(self.commas):
            return np.empty(0, np.int32)
        return _parsed(self.block, self.commas[0::3] + 1, self.commas[1::3], pa.int32(), self.field)

    def _starts(self) -> np.ndarray:
        return np.concatenate(([2], self.commas[2::3] + 2))


def log_prob_entries(block: memoryview | None, field: str) -> LogProbEntries:
    """Find the entries of a list that `cut_list` has cut out; `field` is its name in errors.

    Raises:
        ValueError: it is not a list of [log-prob, id, null].
    """
    if block is None or block == b"[]":
        return LogProbEntries(memoryview(b""), np.empty(0, np.int64), field)
    characters = np.frombuffer(block, np.uint8)
    commas = np.flatnonzero(characters == _COMMA)
    # Each entry has three commas, but the last has two; an entry opens after every third comma.
    shaped = len(commas) % 3 == 2 and block[:2] == b"[[" and block[-7:] == b",null]]"
    if not shaped or not (characters[commas[2::3] + 1] == _OPEN).all():
        raise ValueError(f"{field} is not a list of [log-prob, id, null]")
    return LogProbEntries(block, commas, field)


def id_list(block: memoryview, field: str) -> np.ndarray:
    """Return the ids, int32 [tokens], of a list `[1,2,...]`; `field` is its name in errors.

    Raises:
        ValueError: it is not a list of ids.
    """
    block = block if len(block) <= _SHORT_IDS else _dense(block)
    if block[:1] != b"[" or block[-1:] != b"]":
        raise ValueError(f"{field} is not a list of ids")
    if len(block) <= _SHORT_IDS:
        try:
            return np.array(_ID_LIST.decode(block), np.int32)
        except msgspec.DecodeError as error:
            raise ValueError(f"{field} has an entry that is not an id") from error
    if block == b"[]":
        return np.empty(0, np.int32)
    characters = np.frombuffer(block, np.uint8)[1:-1]
    is_comma = characters == _COMMA
    commas = np.flatnonzero(is_comma) + 1
    try:
        if not (is_comma | (characters - _ZERO < 10)).all():
            raise ValueError(f"{field} has another character than digits and commas")
        starts, ends = np.concatenate(([1], commas + 1)), np.concatenate((commas, [len(block) - 1]))
        return _parsed(block, starts, ends, pa.int32(), field)
    except ValueError as error:
        raise ValueError(f"{field} has an entry that is not an id") from error


def _dense(block: memoryview) -> memoryview:
    """Return `block` without white space; not copied where there is none, and SGLang itself writes none."""
    if not (np.frombuffer(block, np.uint8) <= _SPACE).any():
        return block
    return memoryview(bytes(block).translate(None, _WHITESPACE))


def _parsed(block: memoryview, starts: np.ndarray, ends: np.ndarray, kind: pa.DataType, field: str) -> np.ndarray:
    """Return the numbers written between `starts` and `ends` [n] in `block`."""
    count = len(starts)
    # Every second string is what is between two numbers; it is marked as missing and so not read.
    offsets = np.empty(2 * count + 1, np.int32)
    offsets[0:-1:2], offsets[1::2], offsets[-1] = starts, ends, ends[-1]
    valid = np.full(2 * count // 8 + 1, 0b01010101, np.uint8)
    texts = pa.StringArray.from_buffers(2 * count, *map(pa.py_buffer, (offsets, block, valid)))
    try:
        numbers = texts.cast(kind)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{field}: {error}") from error
    return np.frombuffer(numbers.buffers()[1], kind.to_pandas_dtype(), 2 * count)[::2].copy()
