"""The key of a run: only a client that has it may use the run's servers.

It is in a file that only its owner can read, in a directory that all machines of the run see. Servers and routers are
started with the path of the file, so that the key is on no command line, in no environment and, as Key hides itself, in
no log; clients read it where a server's registration says.
"""

import hashlib
import os
import secrets
from pathlib import Path

from exprl_megatron.errors import ServerError

KEY_FILE = "EXPRL_KEY_FILE"
"""In the environment of a server: the path of its key's file."""


class Key(str):
    """A key whose `repr` hides it, also from what prints a dict or a dataclass that holds it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'(hidden)'"


def renew_key(path: Path) -> None:
    """Put a new key into `path`, whatever was there."""
    path.unlink(missing_ok=True)
    ensure_key(path)


def ensure_key(path: Path) -> None:
    """Put a new key into `path` unless there is one; of several concurrent callers, on any machine, one succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
        file.flush()
        os.fsync(file.fileno())
    try:
        # Unlike a rename it leaves what is there, and what is there is whole.
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()


def read_key(path: str | Path) -> Key:
    """Return the key in `path`.

    Raises:
        ServerError: it cannot be read.
    """
    try:
        return Key(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(
            f"The key of the run's servers cannot be read from {path} ({error}); correct its access rights."
        ) from error


def fingerprint(key: str) -> str:
    """Return a name of the run whose key this is, which does not reveal the key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def authorization(key_file: str | Path | None) -> dict[str, str]:
    """Return the header of a request to servers with the key in `key_file`; none without a file."""
    return {"Authorization": f"Bearer {read_key(key_file)}"} if key_file else {}
