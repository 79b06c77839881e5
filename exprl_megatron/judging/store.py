"""Rubrics and judgements on disk, keyed by the content of what was asked, so that nothing is asked twice.

A SQLite file in WAL mode. What is kept is committed when the call returns, or when its future is done: kill -9 takes
back nothing of it, and a power failure at most the last moments. Any number of processes of one machine may read and
write at once; of two that keep the same key the first wins.
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
from exprl_megatron.judging.store_file import has_version_1, open_store, unusable
from exprl_megatron.judging.store_texts import StoredTexts

TRANSIENT = frozenset({"timeout", "server-error"})
"""Abstentions that say something about the servers and nothing about the trace: another time may bring a verdict."""
SHORTEST_PREFIX = 6

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
class Asked:
    """What went into a question about a trace, or a beginning of one, so that what many questions share is kept once.

    `frame` is JSON; where a message's content is a list there, the trace's text is between its pieces.
    """

    frame: bytes
    trace: str | None = None
    """The whole trace, as the judge is shown it; None where the frame is all."""
    shown: int = 0
    """How many of its characters the question shows."""

    @classmethod
    def of(cls, asked: dict) -> "Asked":
        """Of what went into any question, in JSON's types."""
        return cls(json.dumps(asked, separators=(",", ":")).encode())

    def whole(self) -> dict:
        """All that went into the question."""
        asked = json.loads(self.frame)
        if self.trace is not None:
            for message in asked["messages"]:
                if isinstance(message["content"], list):
                    message["content"] = self.trace[: self.shown].join(message["content"])
        return asked


@dataclass(frozen=True)
class Entry:
    """One row of the store."""

    key: str
    asked: dict
    """What went into the question, as the asker kept it."""
    answer: str
    """The language model's words."""
    created: float
    """Seconds since the epoch."""
    result: Judgement | str
    """The judgement, or a rubric's JSON text."""


@dataclass(frozen=True)
class _Row:
    """A judgement that waits to be written."""

    key: bytes
    asked: Asked
    answer: bytes
    judgement: Judgement
    created: float


class JudgementStore:
    """The store in the file `path`, made where there is none; for any number of threads at once.

    Judgements are written in a thread of the store's own: all that come while it writes go into one transaction.

    Raises UserError, here and in every call, where the file is not such a store, was made by another version, is
    damaged, or cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._reader, self._writer = _Side(self.path), _Side(self.path)
        self._has_version_1 = has_version_1(self._reader.connection)
        self._waiting: list[tuple[list[_Row], Future[None]]] = []
        self._waiting_lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "judgement-store")

    def close(self) -> None:
        """Write what waits, and release the file."""
        self._thread.shutdown()
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> "JudgementStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def find_judgement(self, key: str) -> Judgement | None:
        """What was kept under `key`, bit for bit, or None."""
        return self.find_judgements([key])[0]

    def find_judgements(self, keys: Sequence[str]) -> list[Judgement | None]:
        """The same for each of `keys`."""
        with self._reader.lock:
            return [self._found(key) for key in keys]

    def keep_judgement(self, key: str, asked: dict | Asked, answer: str, judgement: Judgement) -> None:
        """Keep a judgement, what was asked (a dict: in JSON's types) and the judge's whole answer.

        Does nothing where `key` (hexadecimal) has one already, or where the judgement is a transient abstention.
        """
        asked = asked if isinstance(asked, Asked) else Asked.of(asked)
        self.keep_judgements_soon([(key, asked, answer, judgement)]).result()

    def keep_judgements_soon(self, kept: Sequence[tuple[str, Asked, str, Judgement]]) -> Future[None]:
        """The same for several (key, what was asked, answer, judgement), in one transaction, without waiting.

        All are on disk when the future is done.
        """
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()  # who no longer waits takes nothing back
        rows = [
            _Row(bytes.fromhex(key), asked, _bytes(answer), judgement, time.time())
            for key, asked, answer, judgement in kept
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
        """The rubric (JSON text) kept under `key`, or None."""
        with self._reader.lock:
            rows = self._reader.run("SELECT rubric FROM rubrics WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def keep_rubric(self, key: str, asked: dict, answer: str, rubric: str) -> None:
        """Keep a rubric (JSON text), what was asked and the whole answer; nothing where `key` has one already."""
        packed = zlib.compress(json.dumps(asked, separators=(",", ":")).encode(), level=1)
        with self._writer.lock:
            self._writer.run(_KEEP_RUBRIC, (key, packed, _bytes(answer), _bytes(rubric), time.time()))

    def entry(self, prefix: str) -> Entry:
        """The one row whose key begins with `prefix`, hexadecimal and at least SHORTEST_PREFIX long.

        Raises UserError, naming the nearest keys, where there is none or more than one.
        """
        prefix = prefix.strip().lower()
        if len(prefix) < SHORTEST_PREFIX or prefix.strip("0123456789abcdef"):
            raise UserError(f"{prefix!r} is no hash; give at least {SHORTEST_PREFIX} of its hexadecimal digits.")
        found = self._beginning(prefix)
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{len(found)} hashes in {self.path} begin with {prefix}: {_listed(found)}; give more digits."
            )
        near = self._beginning(prefix[:SHORTEST_PREFIX])
        which = "that begin alike are" if near else "kept last are"
        raise UserError(
            f"There is nothing under {prefix} in {self.path}; give another hash, those {which} "
            f"{_listed(near or self.newest(5)) or 'none, for the store is empty'}."
        )

    def newest(self, count: int) -> list[Entry]:
        """The rows kept last, newest first."""
        found = self._entries("ORDER BY rowid DESC LIMIT ?", (count,), (count,))
        return sorted(found, key=lambda entry: entry.created, reverse=True)[:count]

    def _beginning(self, prefix: str) -> list[Entry]:
        if len(prefix) > 64:
            return []
        ends = (prefix.ljust(64, "0"), prefix.ljust(64, "f"))
        found = self._entries("WHERE key BETWEEN ? AND ?", ends, tuple(map(bytes.fromhex, ends)))
        return sorted(found, key=lambda entry: entry.key)

    def _entries(self, clause: str, parameters: tuple, blob_parameters: tuple) -> list[Entry]:
        """The rows of each table that `clause` picks; keys are text, but for those of judgements (blobs)."""
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
        asked = Asked(texts.read(frame), None if trace is None else _text(texts.read(trace)), shown or 0)
        return Entry(key.hex(), asked.whole(), answer, created, judgement)

    def _judgement(self, frame, trace, _shown, answer, value, reason, evidence) -> tuple[str, Judgement]:
        words = _text(self._reader.texts.unpacked(answer, frame, trace))
        because = words if evidence is None else _text(self._reader.texts.unpacked(evidence, frame, trace))
        return words, self._verdict(value, reason, because)

    def _verdict(self, value: float | None, reason: str | None, evidence: str) -> Judgement:
        try:
            if reason is not None:
                return Abstained(reason, evidence)
            if value is None:
                raise ValueError("a judgement has neither a score nor a reason")
            return Scored(value, evidence)
        except (ValueError, TypeError) as error:
            raise unusable(self.path, error) from error

    def _write_waiting(self) -> None:
        """Write all that waits in one transaction."""
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
        frame, trace, shown = texts.keep(row.asked.frame), None, None
        if row.asked.trace is not None:
            trace, shown = texts.keep(_bytes(row.asked.trace), frame), row.asked.shown
        evidence = _bytes(judgement.evidence)
        packed = None if evidence == row.answer else texts.packed(evidence, frame, trace)
        value, reason = (judgement.value, None) if isinstance(judgement, Scored) else (None, judgement.reason)
        answer = texts.packed(row.answer, frame, trace)
        self._writer.run(_KEEP_JUDGEMENT, (row.key, frame, trace, shown, answer, value, reason, packed, row.created))


class _Side:
    """A connection to the store and what belongs to it; hold the lock while using it."""

    def __init__(self, path: Path):
        self._path = path
        self.lock = threading.Lock()
        self.connection = open_store(path)
        self.texts = StoredTexts(self.run)

    def close(self) -> None:
        self.connection.close()

    def run(self, sql: str, parameters: tuple = ()) -> list[tuple]:
        """The rows of one statement; UserError where the file fails."""
        try:
            return self.connection.execute(sql, parameters).fetchall()
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.DatabaseError as error:
            raise unusable(self._path, error) from error

    def transact(self, work) -> None:
        """Commit what `work` writes, or nothing of it."""
        self.run("BEGIN IMMEDIATE")
        try:
            work()
            self.run("COMMIT")
        except BaseException:
            self.texts.forget()
            if self.connection.in_transaction:
                self.connection.rollback()
            raise


def is_final(judgement: Judgement) -> bool:
    """Whether another time would not bring another verdict."""
    return isinstance(judgement, Scored) or judgement.reason not in TRANSIENT


def _rubric_entry(key: str, created: float, asked: bytes, answer: str, rubric: str) -> Entry:
    return Entry(key, json.loads(zlib.decompress(asked)), answer, created, rubric)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _listed(entries: list[Entry]) -> str:
    return ", ".join(entry.key[:16] for entry in entries[:8]) + (", ..." if len(entries) > 8 else "")
