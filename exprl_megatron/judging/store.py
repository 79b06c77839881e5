"""Rubrics and judgements on disk, keyed by the content of what was asked, so that nothing is asked twice.

A SQLite file in WAL mode. Every `keep_...` is a transaction of its own, committed when the call returns: kill -9 takes
back nothing that was kept, and a power failure at most the last moments. Any number of processes of one machine may
read and write at once; of two that keep the same key the first wins.
"""

import hashlib
import json
import os
import sqlite3
import time
import uuid
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored

TRANSIENT = frozenset({"timeout", "server-error"})
"""Abstentions that say something about the servers and nothing about the trace: another time may bring a verdict."""
BUSY_TIMEOUT_S = 30.0
SHORTEST_PREFIX = 6

_APPLICATION_ID = int.from_bytes(b"ExpR")
_SCHEMA_VERSION = 1
# `asked` is JSON, deflated: prompts repeat problem and reference in every row. Evidence is null where it is the answer.
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE rubrics (
    key TEXT PRIMARY KEY, asked BLOB NOT NULL, answer TEXT NOT NULL, rubric TEXT NOT NULL, created REAL NOT NULL
);
CREATE TABLE judgements (
    key TEXT PRIMARY KEY, asked BLOB NOT NULL, answer TEXT NOT NULL,
    value REAL, reason TEXT, evidence TEXT, created REAL NOT NULL,
    kind TEXT NOT NULL AS (CASE WHEN reason IS NULL THEN 'Scored' ELSE 'Abstained' END),
    CHECK ((value IS NULL) <> (reason IS NULL))
);
"""
# Text goes in as bytes, because SQLite's binding refuses the lone surrogates that a JSON answer may hold.
_KEEP_RUBRIC = """
INSERT INTO rubrics (key, asked, answer, rubric, created)
VALUES (?, ?, CAST(? AS TEXT), CAST(? AS TEXT), ?) ON CONFLICT (key) DO NOTHING
"""
_KEEP_JUDGEMENT = """
INSERT INTO judgements (key, asked, answer, value, reason, evidence, created)
VALUES (?, ?, CAST(? AS TEXT), ?, ?, CAST(? AS TEXT), ?) ON CONFLICT (key) DO NOTHING
"""
_ENTRIES = """
SELECT key, asked, answer, created, rubric, NULL, NULL, NULL FROM rubrics
UNION ALL
SELECT key, asked, answer, created, NULL, value, reason, COALESCE(evidence, answer) FROM judgements
"""


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


def content_key(kind: str, /, **parts: str | int | float | bool | None) -> str:
    """SHA-256 (hex) over the canonical JSON of `kind` and the named parts.

    The order of the parts does not matter; their names, values and types do (1, 1.0, True and "1" differ). Raises
    TypeError for a part that is no scalar and ValueError for one that is nan or infinite.
    """
    for name, value in parts.items():
        if not isinstance(value, str | int | float | bool | None):
            raise TypeError(f"the part {name} of a content key is a {type(value).__name__}, not a scalar")
    return hashlib.sha256(_json([kind, parts]).encode()).hexdigest()


class JudgementStore:
    """The store in the file `path`, made where there is none; use it from one thread at a time.

    Raises UserError, here and in every call, where the file is not such a store, was made by another version, is
    damaged, or cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            if not self.path.exists():
                _create(self.path)
            # Autocommit: one statement, one transaction. Without a cursor left open no read blocks a checkpoint.
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"The judgement store {self.path} cannot be opened ({error}); mend judge.store.") from error
        self._connection.text_factory = lambda data: data.decode("utf-8", "surrogatepass")
        try:
            self._check()
            self._run("PRAGMA synchronous = NORMAL")
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    def __enter__(self) -> "JudgementStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def find_judgement(self, key: str) -> Judgement | None:
        """What was kept under `key`, bit for bit, or None."""
        rows = self._run("SELECT value, reason, COALESCE(evidence, answer) FROM judgements WHERE key = ?", (key,))
        return _judgement(*rows[0]) if rows else None

    def keep_judgement(self, key: str, asked: dict, answer: str, judgement: Judgement) -> None:
        """Keep a judgement, what was asked (`asked`: JSON's types) and the judge's whole answer.

        Does nothing where `key` has one already, or where the judgement is a transient abstention. Raises ValueError
        for a score outside [0, 1].
        """
        value, reason = None, None
        if isinstance(judgement, Scored):
            value = judgement.value
            if not 0 <= value <= 1:
                raise ValueError(f"a score is in [0, 1], not {value}")
        elif judgement.reason in TRANSIENT:
            return
        else:
            reason = judgement.reason
        evidence = None if judgement.evidence == answer else _bytes(judgement.evidence)
        row = (key, _packed(asked), _bytes(answer), value, reason, evidence, time.time())
        self._run(_KEEP_JUDGEMENT, row)

    def find_rubric(self, key: str) -> str | None:
        """The rubric (JSON text) kept under `key`, or None."""
        rows = self._run("SELECT rubric FROM rubrics WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def keep_rubric(self, key: str, asked: dict, answer: str, rubric: str) -> None:
        """Keep a rubric (JSON text), what was asked and the whole answer; nothing where `key` has one already."""
        self._run(_KEEP_RUBRIC, (key, _packed(asked), _bytes(answer), _bytes(rubric), time.time()))

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
        return self._entries(f"{_ENTRIES} ORDER BY created DESC LIMIT ?", (count,))

    def _beginning(self, prefix: str) -> list[Entry]:
        end = prefix + "g"  # sorts after all hexadecimal digits
        return self._entries(f"SELECT * FROM ({_ENTRIES}) WHERE key >= ? AND key < ? ORDER BY key", (prefix, end))

    def _entries(self, sql: str, parameters: tuple) -> list[Entry]:
        return [_entry(*row) for row in self._run(sql, parameters)]

    def _check(self) -> None:
        """That the file is a store, and of this version."""
        kind, version = (self._run(f"PRAGMA {name}")[0][0] for name in ("application_id", "user_version"))
        if kind != _APPLICATION_ID:
            raise UserError(f"{self.path} is no judgement store; give another path, or move the file away.")
        if version != _SCHEMA_VERSION:
            raise UserError(
                f"The judgement store {self.path} has version {version}, and this program reads version "
                f"{_SCHEMA_VERSION}; give another path, or move the file away to judge anew."
            )

    def _run(self, sql: str, parameters: tuple = ()) -> list[tuple]:
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"The judgement store {self.path} cannot be used ({error}); "
                "make room or mend its rights, or move the file away to judge anew."
            ) from error


def _create(path: Path) -> None:
    """Make an empty store beside `path` and link it there, so that nobody ever sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        with closing(sqlite3.connect(new)) as connection:
            connection.executescript(_SCHEMA)
        os.link(new, path)
    except FileExistsError:
        return  # another process was first, and its file is as good
    finally:
        new.unlink(missing_ok=True)


def _entry(key: str, asked: bytes, answer: str, created: float, rubric: str | None, *judgement) -> Entry:
    result = _judgement(*judgement) if rubric is None else rubric
    return Entry(key, json.loads(zlib.decompress(asked)), answer, created, result)


def _judgement(value: float | None, reason: str | None, evidence: str) -> Judgement:
    return Abstained(reason, evidence) if reason is not None else Scored(value, evidence)


def _json(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _packed(asked: dict) -> bytes:
    return zlib.compress(json.dumps(asked, separators=(",", ":")).encode(), level=1)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _listed(entries: list[Entry]) -> str:
    return ", ".join(entry.key[:16] for entry in entries[:8]) + (", ..." if len(entries) > 8 else "")
