"""The SQLite file of a judgement store: its schema, how it is made, and how older files are upgraded."""

import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from exprl_megatron.errors import UserError

BUSY_TIMEOUT_S = 30.0
SCHEMA_VERSION = 2

_APPLICATION_ID = int.from_bytes(b"ExpR")
# Texts are there once, by the hash of their content, compressed with the text `base` as dictionary. A judgement was
# asked by the question `frame` about the first `shown` characters of the text `trace`; its answer is compressed with
# both. Evidence is null where it is the answer. Ids grow, so that the newest rows are found without an index of their
# own.
_JUDGEMENTS = """
CREATE TABLE texts (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, base INTEGER, data BLOB NOT NULL);
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, frame INTEGER NOT NULL, trace INTEGER, shown INTEGER,
    answer BLOB NOT NULL, value REAL, reason TEXT, evidence BLOB, created REAL NOT NULL,
    kind TEXT NOT NULL AS (CASE WHEN reason IS NULL THEN 'Scored' ELSE 'Abstained' END),
    CHECK ((value IS NULL) <> (reason IS NULL))
);
"""
# `asked` is JSON, deflated. Behind a trace's last page half a page is empty on average: small ones.
_SCHEMA = f"""
PRAGMA page_size = 2048;
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE rubrics (
    key TEXT PRIMARY KEY, asked BLOB NOT NULL, answer TEXT NOT NULL, rubric TEXT NOT NULL, created REAL NOT NULL
);
{_JUDGEMENTS}
"""
# Judgements of version 1 hold all that was asked, each for itself; they are read where they are.
_FROM_VERSION_1 = f"""
ALTER TABLE judgements RENAME TO judgements_1;
{_JUDGEMENTS}
PRAGMA user_version = {SCHEMA_VERSION};
"""


def open_store(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode to the store in `path`, which is made where there is none.

    Raises UserError where the file is not such a store, is of a version that is not known, or cannot be used.
    """
    try:
        if not path.exists():
            _create(path)
        # Without a cursor left open no read blocks a checkpoint.
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"The judgement store {path} cannot be opened ({error}); correct judge.store.") from error
    connection.text_factory = lambda data: data.decode("utf-8", "surrogatepass")
    try:
        _bring_up_to_date(connection, path)
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise unusable(path, error) from error
    except UserError:
        connection.close()
        raise
    return connection


def unusable(path: Path, error: Exception) -> UserError:
    """What to say where SQLite fails at a store, or a row of it is none that was written."""
    return UserError(
        f"The judgement store {path} cannot be used ({error}); "
        "make room or correct its access rights, or move the file away to judge again."
    )


def has_version_1(connection: sqlite3.Connection) -> bool:
    """Whether the store holds judgements that version 1 wrote."""
    return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'judgements_1'").fetchall())


def _bring_up_to_date(connection: sqlite3.Connection, path: Path) -> None:
    if _pragma(connection, "application_id") != _APPLICATION_ID:
        raise UserError(f"{path} is no judgement store; give another path, or move the file away.")
    if _pragma(connection, "user_version") == 1:
        connection.execute("BEGIN IMMEDIATE")
        # Another process may have been first.
        if _pragma(connection, "user_version") == 1:
            for statement in _FROM_VERSION_1.split(";\n"):
                connection.execute(statement)
        connection.execute("COMMIT")
    if (version := _pragma(connection, "user_version")) != SCHEMA_VERSION:
        raise UserError(
            f"The judgement store {path} has version {version}, and this program reads the versions 1 and "
            f"{SCHEMA_VERSION}; give another path, or move the file away to judge again."
        )


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchall()[0][0]


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
