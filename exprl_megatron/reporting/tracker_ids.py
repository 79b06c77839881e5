"""The ids by which services find a run again: RUN/trackers.json."""

import json
from pathlib import Path

from exprl_megatron.utils.files import write_atomically

_FILE = "trackers.json"


def stored_id(directory: Path, tracker: str) -> str | None:
    """Return the run's id at `tracker`; None where it has none, or the file cannot be read."""
    return _read(directory).get(tracker)


def store_id(directory: Path, tracker: str, identifier: str) -> None:
    """Keep the run's id at `tracker` for the run's next attempt."""
    ids = _read(directory) | {tracker: identifier}
    write_atomically(directory / _FILE, (json.dumps(ids, indent=2) + "\n").encode())


def _read(directory: Path) -> dict[str, str]:
    try:
        found = json.loads((directory / _FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
