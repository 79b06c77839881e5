"""The files of a checkpoint, and the checksums by which a damaged one is known before anything of it is read.

`state.json` holds the checksum (XXH3, 128 bits) of every other file, and one of itself. They find what storage and
interrupted copies do to bytes; they are not signatures, and do not authenticate a checkpoint.
"""

import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from exprl_megatron.utils.required import required

STATE = "state.json"
NAME = re.compile(r"checkpoint-(\d{8})")
DAMAGED = ".damaged"
"""What is added to the name of a checkpoint that does not hold what was written."""

_BLOCK_BYTES = 8 * 2**20
_THREADS = 4
_WRITER = re.compile(r"__(\d+)_\d+\.distcp")
"""torch names the file of a rank's shards so."""


class DamagedCheckpoint(Exception):
    """A checkpoint is damaged; the message names its damaged files."""


def checkpoints(root: str | Path) -> list[Path]:
    """Return all that has the name of a complete checkpoint in `root`, oldest first; what the files hold is not looked
    at.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def number_of(checkpoint: Path) -> int:
    """Return the number in the name of a checkpoint."""
    return int(required(NAME.fullmatch(checkpoint.name), f"a number in {checkpoint}")[1])


def checksums(directory: Path, rank: int, ranks: int) -> dict[str, str]:
    """Return, by name, the checksums of the files in `directory` that `rank` of `ranks` reads; together all of them."""
    names = [path.name for path in directory.iterdir() if path.name != STATE]
    return _checksums(directory, _share(names, rank, ranks))


def write_record(directory: Path, record: dict) -> None:
    """Write `state.json`, which marks a checkpoint complete; on disk when this returns."""
    with open(directory / STATE, "w", encoding="utf-8") as file:
        file.write(_text({"checksum": _checksum_of(record), **record}))
        file.flush()
        os.fsync(file.fileno())


def read_record(directory: str | Path) -> dict:
    """Read a record of `write_record`.

    Raises:
        DamagedCheckpoint: the file is missing or has another content.
    """
    try:
        text = (Path(directory) / STATE).read_bytes().decode()
        record = json.loads(text)
        # The text as a whole is compared: JSON has several spellings of one value.
        intact = _text(record) == text and record.pop("checksum", None) == _checksum_of(record)
    except OSError as error:
        raise DamagedCheckpoint(_unread(STATE, error)) from error
    except (ValueError, RecursionError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"{STATE} is not what was written")
    return record


def faults(directory: Path, recorded: dict[str, str], rank: int, ranks: int) -> list[str]:
    """Return a few words on each file that is missing, cannot be read or holds other bytes than were `recorded`.

    Of the files that are for `rank` of `ranks` to read.
    """
    found = []
    for name in _share(recorded, rank, ranks):
        try:
            same = _checksums(directory, [name])[name] == recorded[name]
        except OSError as error:
            found.append(_unread(name, error))
        else:
            found += [] if same else [f"{name} holds other bytes than were written"]
    return found


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is deleted for a newer one; returns its new path."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    attempt = 1
    while aside.exists():
        attempt += 1
        aside = checkpoint.with_name(f"{checkpoint.name}{DAMAGED}-{attempt}")
    return checkpoint.rename(aside)


def _share(names: Iterable[str], rank: int, ranks: int) -> list[str]:
    """Assign each rank what it wrote, which its node may still have in memory; distribute the rest."""
    dealt = [(int(match[1]) if (match := _WRITER.fullmatch(name)) else i, name) for i, name in enumerate(sorted(names))]
    return [name for reader, name in dealt if reader % ranks == rank]


def _checksums(directory: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: _checksum(directory / name), names), strict=True))


def _checksum(path: Path) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _checksum_of(record: dict) -> str:
    return xxhash.xxh3_128_hexdigest(_text(record).encode())


def _text(record: dict) -> str:
    return json.dumps(record, indent=2)


def _unread(name: str, error: OSError) -> str:
    return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read ({error.strerror})"
