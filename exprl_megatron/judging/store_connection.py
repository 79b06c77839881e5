"""One connection to the SQLite file of a judgement store: its statements, and its rows as objects."""

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.judging.store_file import has_version_1, open_store, store_error
from exprl_megatron.judging.store_rows import Entry, JudgementRow, StoredQuestion, bytes_text, text_bytes
from exprl_megatron.judging.store_texts import StoredTexts

# Text goes in as bytes, because SQLite's binding refuses the lone surrogates that a JSON answer may hold.
_KEEP_RUBRIC = """
INSERT INTO rubrics (key, asked, answer, rubric, created)
VALUES (?, ?, CAST(? AS TEXT), CAST(? AS TEXT), ?) ON CONFLICT (key) DO NOTHING
"""
_KEEP_JUDGEMENT = """
INSERT INTO judgements (key, frame, trace, shown, answer, value, reason, evidence, created)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING
"""
_JUDGEMENTS = "SELECT key, created, frame, trace, shown, answer, value, reason, evidence FROM judgements"
_JUDGEMENTS_1 = "SELECT key, created, asked, answer, value, reason, COALESCE(evidence, answer) FROM judgements_1"
_RUBRICS = "SELECT key, created, asked, answer, rubric FROM rubrics"


class StoreConnection:
    """A connection to the store with its cached texts; hold the lock while using it."""

    def __init__(self, path: Path, read_only: bool = False):
        self._path = path
        self.lock = threading.Lock()
        self.connection = open_store(path, read_only)
        self._has_version_1 = has_version_1(self.connection)
        self.texts = StoredTexts(self.run)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def run(self, sql: str, parameters: tuple = ()) -> list[tuple]:
        """Run one statement and return its rows.

        Raises:
            UserError: SQLite cannot read or write the file.
        """
        try:
            return self.connection.execute(sql, parameters).fetchall()
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.DatabaseError as error:
            raise store_error(self._path, error) from error

    def transact(self, work: Callable[[], None]) -> None:
        """Run `work` in one transaction."""
        self.run("BEGIN IMMEDIATE")
        try:
            work()
            self.run("COMMIT")
        except BaseException:
            self.texts.clear_caches()
            if self.connection.in_transaction:
                self.connection.rollback()
            raise

    def find_judgement(self, key: str) -> Judgement | None:
        """Return the judgement stored under `key`, bit for bit, or None."""
        for row in self.run(f"{_JUDGEMENTS} WHERE key = ?", (bytes.fromhex(key),)):
            return self._judgement(*row[2:])[1]
        if self._has_version_1:
            for row in self.run(f"{_JUDGEMENTS_1} WHERE key = ?", (key,)):
                return self._verdict(*row[4:])
        return None

    def add_judgement(self, row: JudgementRow) -> None:
        """Add a judgement with its question and answer; does nothing where its key has one already."""
        texts, judgement = self.texts, row.judgement
        frame, trace, shown = texts.add(row.question.frame), None, None
        if row.question.trace is not None:
            trace, shown = texts.add(text_bytes(row.question.trace), frame), row.question.num_chars
        evidence = text_bytes(judgement.evidence)
        packed = None if evidence == row.answer else texts.compress(evidence, frame, trace)
        value, reason = (judgement.value, None) if isinstance(judgement, Scored) else (None, judgement.reason)
        answer = texts.compress(row.answer, frame, trace)
        self.run(_KEEP_JUDGEMENT, (row.key, frame, trace, shown, answer, value, reason, packed, row.created))

    def find_rubric(self, key: str) -> str | None:
        """Return the rubric (JSON text) stored under `key`, or None."""
        rows = self.run("SELECT rubric FROM rubrics WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def add_rubric(self, key: str, asked: dict, answer: str, rubric: str) -> None:
        """Add a rubric (JSON text) with its question and answer; does nothing where `key` has a rubric already."""
        packed = zlib.compress(json.dumps(asked, separators=(",", ":")).encode(), level=1)
        self.run(_KEEP_RUBRIC, (key, packed, text_bytes(answer), text_bytes(rubric), time.time()))

    def entries(self, clause: str, parameters: tuple, blob_parameters: tuple) -> list[Entry]:
        """Return the rows of each table that `clause` selects; keys are text, but blobs in the table of judgements."""
        entries = [_rubric_entry(*row) for row in self.run(f"{_RUBRICS} {clause}", parameters)]
        entries += [self._entry(*row) for row in self.run(f"{_JUDGEMENTS} {clause}", blob_parameters)]
        if self._has_version_1:
            entries += [self._entry_1(*row) for row in self.run(f"{_JUDGEMENTS_1} {clause}", parameters)]
        return entries

    def _entry_1(self, key: str, created: float, asked: bytes, answer: str, *judgement) -> Entry:
        return Entry(key, json.loads(zlib.decompress(asked)), answer, created, self._verdict(*judgement))

    def _entry(self, key: bytes, created: float, frame: int, trace: int | None, shown: int | None, *rest) -> Entry:
        answer, judgement = self._judgement(frame, trace, shown, *rest)
        whole = None if trace is None else bytes_text(self.texts.read(trace))
        question = StoredQuestion(self.texts.read(frame), whole, shown or 0)
        return Entry(key.hex(), question.to_dict(), answer, created, judgement)

    def _judgement(self, frame, trace, _shown, answer, value, reason, evidence) -> tuple[str, Judgement]:
        words = bytes_text(self.texts.decompress(answer, frame, trace))
        because = words if evidence is None else bytes_text(self.texts.decompress(evidence, frame, trace))
        return words, self._verdict(value, reason, because)

    def _verdict(self, value: float | None, reason: str | None, evidence: str) -> Judgement:
        try:
            if reason is not None:
                return Abstained(reason, evidence)
            if value is None:
                raise ValueError("a judgement has neither a score nor a reason")
            return Scored(value, evidence)
        except (ValueError, TypeError) as error:
            raise store_error(self._path, error) from error


def _rubric_entry(key: str, created: float, asked: bytes, answer: str, rubric: str) -> Entry:
    return Entry(key, json.loads(zlib.decompress(asked)), answer, created, rubric)
