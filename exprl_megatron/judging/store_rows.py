"""The rows of a judgement store as objects."""

import json
from dataclasses import dataclass

from exprl_megatron.judging.judgement import Judgement


@dataclass(frozen=True)
class StoredQuestion:
    """A question about a trace, or a prefix of one, in the parts that are stored once for many questions.

    `frame` is JSON; where a message's content is a list, the text of the trace goes between its pieces.
    """

    frame: bytes
    trace: str | None = None
    """The whole trace, sanitized; None where the frame is the whole question."""
    num_chars: int = 0
    """Number of characters of the trace that the question contains."""

    @classmethod
    def from_dict(cls, question: dict) -> "StoredQuestion":
        """Make a question of one part from JSON types."""
        return cls(json.dumps(question, separators=(",", ":")).encode())

    def to_dict(self) -> dict:
        """Return the whole question as JSON types."""
        asked = json.loads(self.frame)
        if self.trace is not None:
            for message in asked["messages"]:
                if isinstance(message["content"], list):
                    message["content"] = self.trace[: self.num_chars].join(message["content"])
        return asked


@dataclass(frozen=True)
class Entry:
    """One row of the store."""

    key: str
    question: dict
    """The question as JSON types."""
    answer: str
    """The answer of the language model."""
    created: float
    """Seconds since the epoch."""
    result: Judgement | str
    """The judgement, or a rubric's JSON text."""


@dataclass(frozen=True)
class JudgementRow:
    """A judgement that waits to be written."""

    key: bytes
    question: StoredQuestion
    answer: bytes
    judgement: Judgement
    created: float


def text_bytes(text: str) -> bytes:
    """Return the text as UTF-8, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")


def bytes_text(data: bytes) -> str:
    """Undo `text_bytes`."""
    return data.decode("utf-8", "surrogatepass")
