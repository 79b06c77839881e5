"""CHAMP: 540 model outputs in which people marked the first wrong step (arXiv 2401.06961, package champ-dataset).

A mark is a span of characters, mostly a sentence or a line; all before it is right, and what follows it was not
annotated. 96 outputs have no mistake. Outputs are free text without steps, so that the step that a marked one is
compared with is cut here.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Granularity
from exprl_megatron.problems.problem import Problem, Reference

TYPICAL_STEP_CHARS = 100
"""About the median length of the marked steps, in characters."""
_PIECE = re.compile(r"\S.*?(?:\n|\Z|(?<=[.!?:]) )", re.DOTALL)


def champ_problems() -> dict[str, dict]:
    """Return CHAMP's records by name: problems, solutions, and outputs of models with the marks of annotators.

    Only the file is read, since the package itself builds 19,000 conversations when it is imported.

    Raises:
        UserError: the package champ-dataset is not installed.
    """
    package = importlib.util.find_spec("champ_dataset")
    if package is None or not package.submodule_search_locations:
        raise UserError("The package champ-dataset is not installed; run `pip install champ-dataset`.")
    path = Path(package.submodule_search_locations[0]) / "dataset_files" / "v0.json"
    return json.loads(path.read_text(encoding="utf-8"))["problems"]


@dataclass(frozen=True)
class MarkedTrace:
    """A model's output and the position of its first wrong step."""

    problem: Problem
    generator: str
    """The model that wrote the output, and its prompt."""
    text: str
    error_span: tuple[int, int] | None
    """Half-open span of characters of the first wrong step; None: there is no wrong step."""

    def text_before_error(self, granularity: Granularity) -> str | None:
        """Return the text before the error, which is right, or the whole text where there is no error.

        As a prefix this is all of it; as a segment its last sentences or lines that are together at least as long
        as the marked step. None where the error is at the very beginning.
        """
        right = self.text if self.error_span is None else self.text[: self.error_span[0]]
        if not right.strip():
            return None
        length = TYPICAL_STEP_CHARS if self.error_span is None else self.error_span[1] - self.error_span[0]
        return right if granularity == "prefix" else _last_pieces(right, length)

    def text_with_error(self, granularity: Granularity) -> str | None:
        """Return the marked step, or as a prefix all text up to its end; None where there is no error."""
        if self.error_span is None:
            return None
        start, end = self.error_span
        return self.text[0 if granularity == "prefix" else start : end]


def load_champ(limit: int | None = None) -> tuple[MarkedTrace, ...]:
    """Load the first `limit` marked traces of the package champ-dataset, in its order.

    Raises:
        UserError: the package is not installed.
    """
    traces = [trace for record in champ_problems().values() for trace in marked_traces(record)]
    return tuple(traces[:limit])


def marked_traces(record: Mapping[str, Any]) -> list[MarkedTrace]:
    """Read the marked traces of one problem of CHAMP's JSON from its `fws_annotations`."""
    steps = [_plain(step["_raw_text"]) for step in record["solution"]["steps"]]
    problem = Problem(
        id=record["identifier"],
        text=_plain(record["_raw_text"]),
        reference=Reference("\n".join(steps)),
        answer=_plain(record["_raw_answer"]),
        source="champ",
    )
    return [
        MarkedTrace(
            problem,
            generator,
            annotation["text"],
            None if annotation["start_idx"] is None else (annotation["start_idx"], annotation["end_idx"]),
        )
        for generator, annotation in (record["fws_annotations"] or {}).items()
    ]


def _plain(text: str) -> str:
    """Remove the @@ that CHAMP puts around formulas."""
    return text.replace("@@", "")


def _last_pieces(text: str, length: int) -> str:
    """Return the last sentences or lines of `text` that are together at least `length` characters long, or all
    of it.
    """
    text = text.rstrip()
    for start in reversed([match.start() for match in _PIECE.finditer(text)]):
        if len(text) - start >= length:
            return text[start:]
    return text
