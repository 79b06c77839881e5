"""CHAMP: 540 model outputs in which people marked the first wrong step (arXiv 2401.06961, package champ-dataset).

A mark is a stretch of characters, mostly a sentence or a line; all before it is right, and what follows it was not
looked at. 96 outputs are without a mistake. Outputs are free text without steps of their own, so that a step
to compare a marked one with is cut here.
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

TYPICAL_STEP = 100
"""Characters: about the median of the marked steps."""
_PIECE = re.compile(r"\S.*?(?:\n|\Z|(?<=[.!?:]) )", re.DOTALL)


def champ_problems() -> dict[str, dict]:
    """CHAMP's own records by name: problems, solutions, and outputs of models with the marks of annotators.

    The file alone: the package builds everything it has, 19,000 conversations, when asked for anything. Raises
    UserError where it is not installed.
    """
    package = importlib.util.find_spec("champ_dataset")
    if package is None or not package.submodule_search_locations:
        raise UserError("The package champ-dataset is not installed; run `pip install champ-dataset`.")
    path = Path(package.submodule_search_locations[0]) / "dataset_files" / "v0.json"
    return json.loads(path.read_text(encoding="utf-8"))["problems"]


@dataclass(frozen=True)
class MarkedTrace:
    """A model's output and where its first wrong step is."""

    problem: Problem
    author: str
    """The model that wrote it, and the prompt that it had."""
    text: str
    mark: tuple[int, int] | None
    """First character of the first wrong step and one past its last; None: there is no wrong step."""

    def before(self, granularity: Granularity) -> str | None:
        """What the judge is shown of the part before the mark, all of which is right; of all where nothing is marked.

        As a prefix all of it; as a segment its last sentences or lines that are together at least as long
        as the marked step. None where the mark is at the very beginning.
        """
        right = self.text if self.mark is None else self.text[: self.mark[0]]
        if not right.strip():
            return None
        length = TYPICAL_STEP if self.mark is None else self.mark[1] - self.mark[0]
        return right if granularity == "prefix" else _last_pieces(right, length)

    def after(self, granularity: Granularity) -> str | None:
        """The marked step, and as a prefix all up to its end; None where nothing is marked."""
        if self.mark is None:
            return None
        start, end = self.mark
        return self.text[0 if granularity == "prefix" else start : end]


def load_champ(limit: int | None = None) -> tuple[MarkedTrace, ...]:
    """The first `limit` marked traces of the package champ-dataset, in its order.

    Raises UserError where the package is not installed.
    """
    traces = [trace for record in champ_problems().values() for trace in marked_traces(record)]
    return tuple(traces[:limit])


def marked_traces(record: Mapping[str, Any]) -> list[MarkedTrace]:
    """One problem of CHAMP's JSON with its `fws_annotations`."""
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
            author,
            annotation["text"],
            None if annotation["start_idx"] is None else (annotation["start_idx"], annotation["end_idx"]),
        )
        for author, annotation in (record["fws_annotations"] or {}).items()
    ]


def _plain(text: str) -> str:
    """CHAMP puts @@ around formulas."""
    return text.replace("@@", "")


def _last_pieces(text: str, length: int) -> str:
    """The last sentences or lines of `text` that are together at least `length` characters long, or all of it."""
    text = text.rstrip()
    for start in reversed([match.start() for match in _PIECE.finditer(text)]):
        if len(text) - start >= length:
            return text[start:]
    return text
