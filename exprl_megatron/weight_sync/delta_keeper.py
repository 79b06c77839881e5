"""Keeps a server's copy of the weights up to date: python -m exprl_megatron.weight_sync.delta_keeper SHARED LOCAL HOST.

Runs on a server's machine, which the trainer knows as HOST. It watches the directory SHARED that trainer and servers
both see, copies a full version to LOCAL when one is there, applies each delta that follows, and says in SHARED what it
has; the server then loads LOCAL. SGLang's API knows nothing of deltas: what the server reads is always complete.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.weight_sync.mirror import Mirror, apply_delta

FULL = "full"
ORDER = "order.json"
"""In SHARED: {id, kind: full | delta, file, version}; replaced by the trainer for each sync."""
_POLL_S = 0.05


def answer_path(shared: Path, host: str) -> Path:
    """Where the keeper of `host` says what it has done: {id of the order, local, error}."""
    return shared / f"keeper-{host}.json"


def main() -> None:
    """Until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("local", type=Path)
    parser.add_argument("host")
    args = parser.parse_args()
    done = None
    while True:
        order = _read(args.shared / ORDER)
        if order is None or order["id"] == done:
            time.sleep(_POLL_S)
            continue
        done = order["id"]
        error = None
        try:
            obey(order, args.shared, args.local)
        except (UserError, OSError) as problem:
            error = str(problem)
        _say(args.shared, args.host, done, args.local, error)


def obey(order: dict, shared: Path, local: Path) -> None:
    """Bring `local` to the order's version. Raises UserError where the delta does not fit or is damaged."""
    if order["kind"] == FULL:
        shutil.rmtree(local, ignore_errors=True)
        shutil.copytree(shared / order["file"], local)
    else:
        apply_delta(Mirror(local), shared / order["file"])


def write_whole(path: Path, told: dict) -> None:
    """Write JSON so that nobody reads half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(told))
    partial.rename(path)


def _say(shared: Path, host: str, order: str, local: Path, error: str | None) -> None:
    write_whole(answer_path(shared, host), {"id": order, "local": str(local), "error": error})


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    main()
