"""Stores rubrics and judgements on disk, by the content of the question, so that no question is asked twice.

The store is a SQLite file in WAL mode. A row is committed when the call returns, or when its future is done: kill -9
loses no committed row, and a power failure at most the last moments. Several processes of one machine may read and
write at the same time; of two that add the same key the first wins.
"""

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.judging.store_file import has_version_1, open_store, store_error
from exprl_megatron.judging.store_texts import StoredTexts

TRANSIENT_REASONS = frozenset({"timeout", "server-error"})
"""Reasons of abstentions that are about the servers and not about the trace: a later request may give a score."""
MIN_PREFIX_LENGTH = 6
"""Hexadecimal digits by which an entry can be looked up."""

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
class _Row:
    """A judgement that waits to be written."""

    key: bytes
    question: StoredQuestion
    answer: bytes
    judgement: Judgement
    created: float


class JudgementStore:
    """The store in the file `path`, which is created if it does not exist; safe for use by several threads.

    Judgements are written in a thread of the store: all that arrive while it writes go into one transaction.

    Raises:
        UserError: (also in every method) the file is not a judgement store, was made by another version, is damaged,
            or cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._reader, self._writer = _Connection(self.path), _Connection(self.path)
        self._has_version_1 = has_version_1(self._reader.connection)
        self._waiting: list[tuple[list[_Row], Future[None]]] = []
        self._waiting_lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "judgement-store")

    def close(self) -> None:
        """Write the pending judgements, and close the file."""
        self._thread.shutdown()
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> "JudgementStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def find_judgement(self, key: str) -> Judgement | None:
        """Return the judgement stored under `key`, bit for bit, or None."""
        return self.find_judgements([key])[0]

    def find_judgements(self, keys: Sequence[str]) -> list[Judgement | None]:
        """Return the judgement stored under each of `keys`, or None."""
        with self._reader.lock:
            return [self._found(key) for key in keys]

    def add_judgement(self, key: str, asked: dict | StoredQuestion, answer: str, judgement: Judgement) -> None:
        """Add a judgement with its question and the whole answer of the judge, and wait until it is on disk.

        Does nothing where `key` (hexadecimal) has a judgement already, or where this one is a transient abstention.
        """
        asked = asked if isinstance(asked, StoredQuestion) else StoredQuestion.from_dict(asked)
        self.submit_judgements([(key, asked, answer, judgement)]).result()

    def submit_judgements(self, judgements: Sequence[tuple[str, StoredQuestion, str, Judgement]]) -> Future[None]:
        """Add several (key, question, answer, judgement) in one transaction, without waiting.

        All of them are on disk when the future is done.
        """
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()  # a caller that no longer waits does not cancel the write
        rows = [
            _Row(bytes.fromhex(key), asked, _bytes(answer), judgement, time.time())
            for key, asked, answer, judgement in judgements
            if is_final(judgement)
        ]
        if not rows:
            written.set_result(None)
            return written
        with self._waiting_lock:
            self._waiting.append((rows, written))
            if len(self._waiting) == 1:
                self._thread.submit(self._write_waiting)
        return written

    def find_rubric(self, key: str) -> str | None:
        """Return the rubric (JSON text) stored under `key`, or None."""
        with self._reader.lock:
            rows = self._reader.run("SELECT rubric FROM rubrics WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def add_rubric(self, key: str, asked: dict, answer: str, rubric: str) -> None:
        """Add a rubric (JSON text) with its question and answer; does nothing where `key` has a rubric already."""
        packed = zlib.compress(json.dumps(asked, separators=(",", ":")).encode(), level=1)
        with self._writer.lock:
            self._writer.run(_KEEP_RUBRIC, (key, packed, _bytes(answer), _bytes(rubric), time.time()))

    def entry(self, prefix: str) -> Entry:
        """Return the one row whose key begins with `prefix`, hexadecimal and at least MIN_PREFIX_LENGTH long.

        Raises:
            UserError: no row or more than one has this prefix; the message names the nearest keys.
        """
        prefix = prefix.strip().lower()
        if len(prefix) < MIN_PREFIX_LENGTH or prefix.strip("0123456789abcdef"):
            raise UserError(f"{prefix!r} is not a hash; give at least {MIN_PREFIX_LENGTH} of its hexadecimal digits.")
        found = self._beginning(prefix)
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{len(found)} hashes in {self.path} begin with {prefix}: {_listed(found)}; give more digits."
            )
        near = self._beginning(prefix[:MIN_PREFIX_LENGTH])
        which = "similar ones" if near else "the newest ones"
        raise UserError(
            f"There is nothing under {prefix} in {self.path}; give another hash, {which} are "
            f"{_listed(near or self.newest(5)) or 'none, since the store is empty'}."
        )

    def newest(self, count: int) -> list[Entry]:
        """Return the `count` newest rows, newest first."""
        found = self._entries("ORDER BY rowid DESC LIMIT ?", (count,), (count,))
        return sorted(found, key=lambda entry: entry.created, reverse=True)[:count]

    def _beginning(self, prefix: str) -> list[Entry]:
        if len(prefix) > 64:
            return []
        ends = (prefix.ljust(64, "0"), prefix.ljust(64, "f"))
        found = self._entries("WHERE key BETWEEN ? AND ?", ends, tuple(map(bytes.fromhex, ends)))
        return sorted(found, key=lambda entry: entry.key)

    def _entries(self, clause: str, parameters: tuple, blob_parameters: tuple) -> list[Entry]:
        """Return the rows of each table that `clause` selects; keys are text, but blobs in the table of judgements."""
        with self._reader.lock:
            run = self._reader.run
            entries = [_rubric_entry(*row) for row in run(f"{_RUBRICS} {clause}", parameters)]
            entries += [self._entry(*row) for row in run(f"{_JUDGEMENTS} {clause}", blob_parameters)]
            if self._has_version_1:
                entries += [self._entry_1(*row) for row in run(f"{_JUDGEMENTS_1} {clause}", parameters)]
        return entries

    def _found(self, key: str) -> Judgement | None:
        for row in self._reader.run(f"{_JUDGEMENTS} WHERE key = ?", (bytes.fromhex(key),)):
            return self._judgement(*row[2:])[1]
        if self._has_version_1:
            for row in self._reader.run(f"{_JUDGEMENTS_1} WHERE key = ?", (key,)):
                return self._verdict(*row[4:])
        return None

    def _entry_1(self, key: str, created: float, asked: bytes, answer: str, *judgement) -> Entry:
        return Entry(key, json.loads(zlib.decompress(asked)), answer, created, self._verdict(*judgement))

    def _entry(self, key: bytes, created: float, frame: int, trace: int | None, shown: int | None, *rest) -> Entry:
        texts = self._reader.texts
        answer, judgement = self._judgement(frame, trace, shown, *rest)
        question = StoredQuestion(texts.read(frame), None if trace is None else _text(texts.read(trace)), shown or 0)
        return Entry(key.hex(), question.to_dict(), answer, created, judgement)

    def _judgement(self, frame, trace, _shown, answer, value, reason, evidence) -> tuple[str, Judgement]:
        words = _text(self._reader.texts.decompress(answer, frame, trace))
        because = words if evidence is None else _text(self._reader.texts.decompress(evidence, frame, trace))
        return words, self._verdict(value, reason, because)

    def _verdict(self, value: float | None, reason: str | None, evidence: str) -> Judgement:
        try:
            if reason is not None:
                return Abstained(reason, evidence)
            if value is None:
                raise ValueError("a judgement has neither a score nor a reason")
            return Scored(value, evidence)
        except (ValueError, TypeError) as error:
            raise store_error(self.path, error) from error

    def _write_waiting(self) -> None:
        """Write all pending judgements in one transaction."""
        with self._waiting_lock:
            waiting, self._waiting = self._waiting, []
        try:
            with self._writer.lock:
                self._writer.transact(lambda: self._write_all(row for rows, _ in waiting for row in rows))
        except BaseException as error:
            for _, written in waiting:
                written.set_exception(error)
        else:
            for _, written in waiting:
                written.set_result(None)

    def _write_all(self, rows: Iterable[_Row]) -> None:
        for row in rows:
            self._write(row)

    def _write(self, row: _Row) -> None:
        texts, judgement = self._writer.texts, row.judgement
        frame, trace, shown = texts.add(row.question.frame), None, None
        if row.question.trace is not None:
            trace, shown = texts.add(_bytes(row.question.trace), frame), row.question.num_chars
        evidence = _bytes(judgement.evidence)
        packed = None if evidence == row.answer else texts.compress(evidence, frame, trace)
        value, reason = (judgement.value, None) if isinstance(judgement, Scored) else (None, judgement.reason)
        answer = texts.compress(row.answer, frame, trace)
        self._writer.run(_KEEP_JUDGEMENT, (row.key, frame, trace, shown, answer, value, reason, packed, row.created))


class _Connection:
    """A connection to the store with its cached texts; hold the lock while using it."""

    def __init__(self, path: Path):
        self._path = path
        self.lock = threading.Lock()
        self.connection = open_store(path)
        self.texts = StoredTexts(self.run)

    def close(self) -> None:
        self.connection.close()

    def run(self, sql: str, parameters: tuple = ()) -> list[tuple]:
        """Run one statement and return its rows; raises UserError where the file fails."""
        try:
            return self.connection.execute(sql, parameters).fetchall()
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.DatabaseError as error:
            raise store_error(self._path, error) from error

    def transact(self, work) -> None:
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


def is_final(judgement: Judgement) -> bool:
    """Return whether a repeated question would not give another judgement: a score, or an abstention that is not
    transient.
    """
    return isinstance(judgement, Scored) or judgement.reason not in TRANSIENT_REASONS


def _rubric_entry(key: str, created: float, asked: bytes, answer: str, rubric: str) -> Entry:
    return Entry(key, json.loads(zlib.decompress(asked)), answer, created, rubric)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _listed(entries: list[Entry]) -> str:
    return ", ".join(entry.key[:16] for entry in entries[:8]) + (", ..." if len(entries) > 8 else "")
