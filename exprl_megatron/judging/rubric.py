"""Rubrics of weighted checkpoints: their checked JSON form, and the score that follows from a judge's marks.

A rubric belongs to one problem. A language model builds it once from the problem and its reference (see
rubric_builder.py). The judge then marks each checkpoint, and the score is computed here, so that a judge cannot
miscount and two traces with the same marks have the same score.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exprl_megatron.judging.judgement import Granularity
from exprl_megatron.judging.verdict import Mark

MIN_CHECKPOINTS, MAX_CHECKPOINTS = 2, 6
MARK_VALUES: dict[Mark, float] = {"established": 1.0, "partial": 0.5, "absent": 0.0, "contradicted": -1.0}
"""The value of a mark, as a share of its checkpoint's weight."""
SOUND_FLOOR = 0.3
"""The score of a sound prefix or segment that has not reached any checkpoint yet."""
UNSOUND_SHARE = 0.3
"""The share of its progress that an unsound text gets as its score."""


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
        """The rubric as the judge reads it: one numbered line for each checkpoint."""
        return "\n".join(f"{i}. {' '.join(c.text.split())}" for i, c in enumerate(self.checkpoints, start=1))

    def score(self, marks: Sequence[Mark], granularity: Granularity = "trace", sound: bool | None = None) -> float:
        """Compute the score in [0, 1] of a text from its progress p (see `progress`) and its soundness.

        A text is sound where the judge says so and no checkpoint is contradicted. An unsound text gets 0.3 p. A sound
        trace gets p, a sound prefix or segment 0.3 + 0.7 p: valid work that has not reached a checkpoint yet is worth
        more than work with an error, while a whole trace that reaches nothing is worth nothing.

        Args:
            marks: the mark of each checkpoint.
            granularity: what the text is.
            sound: whether the judge calls the text sound; None: the judge was not asked, and the score is p.
        """
        progress = self.progress(marks, granularity)
        if sound is None:
            return progress
        if not sound or "contradicted" in marks:
            return UNSOUND_SHARE * progress
        floor = 0.0 if granularity == "trace" else SOUND_FLOOR
        return floor + (1 - floor) * progress

    def progress(self, marks: Sequence[Mark], granularity: Granularity = "trace") -> float:
        """Compute the share of a solution that the marks amount to, in [0, 1].

        Of a trace or a prefix it is the weighted mean of the marks' values (established 1, partial 1/2, absent 0,
        contradicted -1), and 0 where that is negative. A contradiction costs what its checkpoint would have added,
        so that the score of growing prefixes falls where a trace goes wrong, and a trace that establishes much and
        then reaches another answer loses a part of its score.

        Of a single segment it is 0 where the segment contradicts a checkpoint, else the value of its best mark: one
        step cannot establish more than its own part, so that the weights of the others do not count against it.
        """
        values = [MARK_VALUES[mark] for mark in marks]
        if granularity == "segment":
            return 0.0 if min(values) < 0 else max(values)
        pairs = list(zip(self.checkpoints, values, strict=True))
        return max(0.0, sum(c.weight * value for c, value in pairs) / sum(c.weight for c, _ in pairs))

    def to_json(self) -> str:
        """Return the rubric as JSON text, which `parse_rubric` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)


class RubricError(ValueError):
    """A rubric fails a check; the message says which."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _CheckpointForm(_Form):
    text: str = Field(min_length=1)
    weight: float = Field(gt=0, le=1e6)
    quote: str = Field(min_length=1)


class _RubricForm(_Form):
    checkpoints: list[_CheckpointForm] = Field(min_length=MIN_CHECKPOINTS, max_length=MAX_CHECKPOINTS)


def rubric_schema() -> str:
    """Return the JSON schema (text) of a rubric, for servers that constrain the answer.

    It is stricter than `parse_rubric`: weights are integers of 1 to 5, and texts have a maximum length.
    """
    text = {"type": "string", "minLength": 1, "maxLength": 600}
    weight = {"type": "integer", "minimum": 1, "maximum": 5}
    checkpoint = _object({"text": text, "weight": weight, "quote": text})
    checkpoints = {"type": "array", "items": checkpoint, "minItems": MIN_CHECKPOINTS, "maxItems": MAX_CHECKPOINTS}
    return json.dumps(_object({"checkpoints": checkpoints}))


def parse_rubric(text: str, reference: str) -> Rubric:
    """Parse the rubric in a model's answer: the last JSON object that has checkpoints.

    Raises:
        RubricError: there is no such object, it does not have 2 to 6 checkpoints with text, positive weight and
            quote, two checkpoints are equal, or a quote is not in the `reference`, apart from whitespace.
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
        raise RubricError("two checkpoints are equal, or one is empty")
    for number, checkpoint in enumerate(checkpoints, start=1):
        if not is_quoted(checkpoint.quote, reference):
            raise RubricError(f"the quote of checkpoint {number} is not in the reference: {checkpoint.quote!r}")
    return Rubric(checkpoints)


def is_quoted(quote: str, reference: str) -> bool:
    """Return whether `quote` is in `reference` as whole words, regardless of whitespace."""
    words = _plain(quote)
    if not any(character.isalnum() for character in words):
        return False
    # \b beside a character that is not a word character would require a word character on its other side.
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
