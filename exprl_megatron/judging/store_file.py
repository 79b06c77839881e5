"""The SQLite file of a judgement store: its schema, its creation, and the upgrade of older files."""

import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from exprl_megatron.errors import UserError

BUSY_TIMEOUT_S = 30.0
SCHEMA_VERSION = 2

_APPLICATION_ID = int.from_bytes(b"ExpR")
# Each text is stored once, by the hash of its content, compressed with the text `base` as dictionary. The question of a
# judgement is `frame` with the first `shown` characters of the text `trace`; its answer is compressed with both.
# Evidence is null where it equals the answer. Ids grow, so that the newest rows are found without a further index.
_JUDGEMENTS = """
CREATE TABLE texts (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, base INTEGER, data BLOB NOT NULL);
CREATE TABLE judgements (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, frame INTEGER NOT NULL, trace INTEGER, shown INTEGER,
    answer BLOB NOT NULL, value REAL, reason TEXT, evidence BLOB, created REAL NOT NULL,
    kind TEXT NOT NULL AS (CASE WHEN reason IS NULL THEN 'Scored' ELSE 'Abstained' END),
    CHECK ((value IS NULL) <> (reason IS NULL))
);
"""
# `asked` is JSON, deflated. Pages are small, since half of a trace's last page is empty on average.
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
# Judgements of version 1 have the whole question in each row; they are read where they are.
_FROM_VERSION_1 = f"""
ALTER TABLE judgements RENAME TO judgements_1;
{_JUDGEMENTS}
PRAGMA user_version = {SCHEMA_VERSION};
"""


def open_store(path: Path, read_only: bool = False) -> sqlite3.Connection:
    """Connect in autocommit mode to the store in `path`, which is created if it does not exist.

    With `read_only` it is also opened where this user may not write, for example in an archive.

    Raises:
        UserError: the file is not a judgement store, has an unknown version, or cannot be used.
    """
    try:
        if not path.exists():
            _create(path)
        # No cursor stays open, so that no read blocks a checkpoint.
        connection = sqlite3.connect(
            _uri(path, read_only), timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=True
        )
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"The judgement store {path} cannot be opened ({error}); correct judge.store.") from error
    connection.text_factory = lambda data: data.decode("utf-8", "surrogatepass")
    try:
        _bring_up_to_date(connection, path)
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise store_error(path, error) from error
    except UserError:
        connection.close()
        raise
    return connection


def _uri(path: Path, read_only: bool) -> str:
    uri = path.resolve().as_uri()
    if not read_only or (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        return uri
    # Reading in WAL mode needs the files -wal and -shm, which SQLite cannot make here. Where there are none, nothing
    # but the file itself has rows.
    wal = path.with_name(f"{path.name}-wal")
    return f"{uri}?mode=ro" if wal.exists() else f"{uri}?immutable=1"


def store_error(path: Path, error: Exception) -> UserError:
    """Return the error for a store that SQLite cannot use, or that has an invalid row."""
    return UserError(
        f"The judgement store {path} cannot be used ({error}); "
        "make room or correct its access rights, or move the file away to judge again."
    )


def has_version_1(connection: sqlite3.Connection) -> bool:
    """Return whether the store has judgements that version 1 wrote."""
    return bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'judgements_1'").fetchall())


def _bring_up_to_date(connection: sqlite3.Connection, path: Path) -> None:
    if _pragma(connection, "application_id") != _APPLICATION_ID:
        raise UserError(f"{path} is not a judgement store; give another path, or move the file away.")
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
    """Create an empty store under another name and link it to `path`, so that no process sees an incomplete one."""
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
