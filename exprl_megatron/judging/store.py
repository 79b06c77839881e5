"""Stores rubrics and judgements on disk, by the content of the question, so that no question is asked twice.

The store is a SQLite file in WAL mode. A row is committed when the call returns, or when its future is done: kill -9
loses no committed row, and a power failure at most the last moments. Several processes of one machine may read and
write at the same time; of two that add the same key the first wins.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Judgement, Scored
from exprl_megatron.judging.store_connection import StoreConnection
from exprl_megatron.judging.store_rows import Entry, JudgementRow, StoredQuestion, text_bytes

TRANSIENT_REASONS = frozenset({"timeout", "server-error"})
"""Reasons of abstentions that are about the servers and not about the trace: a later request may give a score."""
MIN_PREFIX_LENGTH = 6
"""Hexadecimal digits by which an entry can be looked up."""


class JudgementStore:
    """The store in the file `path`, which is created if it does not exist; safe for use by several threads.

    With `read_only` nothing is added, and the store can also be one that this user may not write to.

    Judgements are written in a thread of the store: all that arrive while it writes go into one transaction.

    Raises:
        UserError: (also in every method) the file is not a judgement store, was made by another version, is damaged,
            or cannot be read or written.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self.path = Path(path)
        self._reader, self._writer = StoreConnection(self.path, read_only), StoreConnection(self.path, read_only)
        self._waiting: list[tuple[list[JudgementRow], Future[None]]] = []
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
            return [self._reader.find_judgement(key) for key in keys]

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
            JudgementRow(bytes.fromhex(key), asked, text_bytes(answer), judgement, time.time())
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
            return self._reader.find_rubric(key)

    def add_rubric(self, key: str, asked: dict, answer: str, rubric: str) -> None:
        """Add a rubric (JSON text) with its question and answer; does nothing where `key` has a rubric already."""
        with self._writer.lock:
            self._writer.add_rubric(key, asked, answer, rubric)

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
        with self._reader.lock:
            found = self._reader.entries("ORDER BY rowid DESC LIMIT ?", (count,), (count,))
        return sorted(found, key=lambda entry: entry.created, reverse=True)[:count]

    def _beginning(self, prefix: str) -> list[Entry]:
        if len(prefix) > 64:
            return []
        ends = (prefix.ljust(64, "0"), prefix.ljust(64, "f"))
        with self._reader.lock:
            found = self._reader.entries("WHERE key BETWEEN ? AND ?", ends, tuple(map(bytes.fromhex, ends)))
        return sorted(found, key=lambda entry: entry.key)

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

    def _write_all(self, rows: Iterable[JudgementRow]) -> None:
        for row in rows:
            self._writer.add_judgement(row)


def is_final(judgement: Judgement) -> bool:
    """Return whether a repeated question would not give another judgement: a score, or an abstention that is not
    transient.
    """
    return isinstance(judgement, Scored) or judgement.reason not in TRANSIENT_REASONS


def _listed(entries: list[Entry]) -> str:
    return ", ".join(entry.key[:16] for entry in entries[:8]) + (", ..." if len(entries) > 8 else "")
