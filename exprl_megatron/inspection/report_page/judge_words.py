"""What the judge was asked and what it answered about a trace, from the judgement store of a run."""

from pathlib import Path
from typing import Any

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.stored_judgements import store_file
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.judging.store_rows import Entry
from exprl_megatron.judging.verdict import read_marks
from exprl_megatron.reporting.plain_text import escaped


class JudgeWords:
    """The questions and rubrics behind the judgements of one run; a run without a store has none.

    As a context, so that the store is closed.
    """

    def __init__(self, run: Path):
        self._store: JudgementStore | None
        try:
            self._store = JudgementStore(store_file(run, None), read_only=True)
        except UserError:
            self._store = None

    def __enter__(self) -> "JudgeWords":
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()

    def asked(self, key: str | None) -> dict[str, Any] | None:
        """Return {messages: [[role, text]], rubric: [{text, weight, quote, mark}], answer} of the judgement under
        `key`.

        None where there is no store or the store has no such entry.
        """
        if self._store is None or key is None:
            return None
        try:
            entry = self._store.entry(key)
        except UserError:
            return None
        messages = [[escaped(str(m["role"])), escaped(str(m["content"]))] for m in entry.question.get("messages", [])]
        return {"messages": messages, "rubric": _marked_rubric(entry), "answer": escaped(entry.answer)}


def _marked_rubric(entry: Entry) -> list[dict[str, Any]]:
    """Return the checkpoints that the judge marked, each with its mark; empty where it had no rubric."""
    checkpoints = (entry.question.get("rubric") or {}).get("checkpoints", [])
    marks = read_marks(entry.answer, len(checkpoints)) or (None,) * len(checkpoints)
    return [
        {"text": escaped(each["text"]), "weight": each["weight"], "quote": escaped(each["quote"]), "mark": mark}
        for each, mark in zip(checkpoints, marks, strict=True)
    ]
