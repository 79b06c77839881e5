"""Rubrics of weighted checkpoints: their checked JSON form, and the score that follows from a judge's marks.

A rubric belongs to one problem. A language model draws it, once, from the problem and its reference (see
rubric_builder.py); the judge then marks each checkpoint, and the score is computed here, so that a judge cannot
miscount and two traces with the same marks have the same score.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exprl_megatron.judging.judgement import Granularity
from exprl_megatron.judging.verdict import Mark

FEWEST, MOST = 2, 6
VALUES: dict[Mark, float] = {"established": 1.0, "partial": 0.5, "absent": 0.0, "contradicted": -1.0}
"""What a mark is worth, as a share of its checkpoint's weight."""
SOUND_FLOOR = 0.3
"""The score of a sound prefix or segment that has not reached any checkpoint yet."""
UNSOUND_SHARE = 0.3
"""What of its progress an unsound text keeps."""


@dataclass(frozen=True)
class Checkpoint:
    """A claim that a right solution has to reach."""

    text: str
    weight: float
    """Positive; only ratios matter."""
    quote: str
    """The words of the reference that support it."""


@dataclass(frozen=True)
class Rubric:
    """The checkpoints of one problem, in the reference's order."""

    checkpoints: tuple[Checkpoint, ...]

    @property
    def text(self) -> str:
        """As the judge reads it: one numbered line for each checkpoint."""
        return "\n".join(f"{i}. {' '.join(c.text.split())}" for i, c in enumerate(self.checkpoints, start=1))

    def score(self, marks: Sequence[Mark], granularity: Granularity = "trace", sound: bool | None = None) -> float:
        """The score in [0, 1] of what was marked, from its progress p and whether it is `sound`.

        None: the judge was not asked, and the score is p. Else a text is sound where the judge says so and no
        checkpoint is contradicted. What is not sound gets 0.3 p. A sound trace gets p, a sound prefix or segment
        0.3 + 0.7 p: valid work that has not reached a checkpoint yet is worth more than work with an error, while a
        whole trace that reaches nothing is worth nothing.
        """
        progress = self.progress(marks, granularity)
        if sound is None:
            return progress
        if not sound or "contradicted" in marks:
            return UNSOUND_SHARE * progress
        floor = 0.0 if granularity == "trace" else SOUND_FLOOR
        return floor + (1 - floor) * progress

    def progress(self, marks: Sequence[Mark], granularity: Granularity = "trace") -> float:
        """How much of a solution the marks make up, in [0, 1].

        A trace or a prefix: the weighted mean of the marks' values (established 1, partial 1/2, absent 0,
        contradicted -1), and 0 where that is negative. A contradiction costs what its checkpoint would have added,
        so that the score of growing prefixes falls where a trace goes wrong, and a trace that establishes much and
        then arrives at another answer does not keep all that it had.

        A segment alone: 0 where it contradicts any checkpoint, else its best mark's value. One step cannot
        establish more than its own part, so that the weights of the others do not count against it.
        """
        values = [VALUES[mark] for mark in marks]
        if granularity == "segment":
            return 0.0 if min(values) < 0 else max(values)
        pairs = list(zip(self.checkpoints, values, strict=True))
        return max(0.0, sum(c.weight * value for c, value in pairs) / sum(c.weight for c, _ in pairs))

    def to_json(self) -> str:
        """The rubric as JSON text that `checked_rubric` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)


class RubricError(ValueError):
    """A rubric that fails a check; the message says which."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _CheckpointForm(_Form):
    text: str = Field(min_length=1)
    weight: float = Field(gt=0)
    quote: str = Field(min_length=1)


class _RubricForm(_Form):
    checkpoints: list[_CheckpointForm] = Field(min_length=FEWEST, max_length=MOST)


def rubric_schema() -> str:
    """JSON schema (text) of a rubric, for servers that constrain what is written.

    Narrower than what is accepted: whole weights of 1 to 5, texts that end.
    """
    text = {"type": "string", "minLength": 1, "maxLength": 600}
    weight = {"type": "integer", "minimum": 1, "maximum": 5}
    checkpoint = _object({"text": text, "weight": weight, "quote": text})
    checkpoints = {"type": "array", "items": checkpoint, "minItems": FEWEST, "maxItems": MOST}
    return json.dumps(_object({"checkpoints": checkpoints}))


def checked_rubric(text: str, reference: str) -> Rubric:
    """The rubric in a builder's words: the last JSON object among them that has checkpoints.

    Raises RubricError where there is none, where it does not have 2 to 6 checkpoints with text, positive weight and
    quote, where two checkpoints say the same, or where a quote is not in the `reference`, whitespace apart.
    """
    try:
        form = _RubricForm.model_validate(_last_object(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RubricError(f"{place}: {first['msg']}") from error
    checkpoints = tuple(Checkpoint(**checkpoint.model_dump()) for checkpoint in form.checkpoints)
    texts = [_plain(checkpoint.text).casefold() for checkpoint in checkpoints]
    if len(set(texts)) < len(texts) or not all(texts):
        raise RubricError("two checkpoints say the same, or one says nothing")
    for number, checkpoint in enumerate(checkpoints, start=1):
        if not supported(checkpoint.quote, reference):
            raise RubricError(f"the quote of checkpoint {number} is not in the reference: {checkpoint.quote!r}")
    return Rubric(checkpoints)


def supported(quote: str, reference: str) -> bool:
    """Whether `quote` is in `reference` as whole words, however either is broken into lines and spaced."""
    words = _plain(quote)
    if not any(character.isalnum() for character in words):
        return False
    # \b before a character that is none of a word would ask for one of a word before it.
    first, last = (r"\b" if re.match(r"\w", words[end]) else "" for end in (0, -1))
    return re.search(rf"{first}{re.escape(words)}{last}", _plain(reference)) is not None


def _plain(text: str) -> str:
    return " ".join(text.split())


def _last_object(text: str) -> dict:
    decoder, found, place = json.JSONDecoder(), None, text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            found = value if "checkpoints" in value else found
        place = text.find("{", end)
    if found is None:
        raise RubricError("there is no JSON object with checkpoints")
    return found


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
