"""Keeps a server's copy of the weights up to date: python -m exprl_megatron.weight_sync.delta_agent SHARED LOCAL HOST.

Runs on a server's machine, which the trainer knows as HOST. It watches the directory SHARED that trainer and servers
both see, copies a full version to LOCAL when one is there, applies each delta that follows, and reports in SHARED
which version it has; the server then loads LOCAL. SGLang's API has no deltas: the server always reads complete weights.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.weight_sync.base_snapshot import BaseSnapshot, apply_delta

FULL = "full"
REQUEST = "request.json"
"""In SHARED: {id, kind: full | delta, file, version}; replaced by the trainer for each sync."""
_POLL_S = 0.05


def answer_path(shared: Path, host: str) -> Path:
    """Return the file in which the agent of `host` reports: {id of the request, local, error}."""
    return shared / f"agent-{host}.json"


def main() -> None:
    """Serve requests until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("local", type=Path)
    parser.add_argument("host")
    args = parser.parse_args()
    done = None
    while True:
        request = _read(args.shared / REQUEST)
        if request is None or request["id"] == done:
            time.sleep(_POLL_S)
            continue
        done = request["id"]
        error = None
        try:
            apply_request(request, args.shared, args.local)
        except (UserError, OSError) as problem:
            error = str(problem)
        _report(args.shared, args.host, done, args.local, error)


def apply_request(request: dict, shared: Path, local: Path) -> None:
    """Update `local` to the request's version. Raises UserError where the delta does not fit or is damaged."""
    if request["kind"] == FULL:
        shutil.rmtree(local, ignore_errors=True)
        shutil.copytree(shared / request["file"], local)
    else:
        apply_delta(BaseSnapshot(local), shared / request["file"])


def write_whole(path: Path, record: dict) -> None:
    """Write `record` as JSON, atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.rename(path)


def _report(shared: Path, host: str, request: str, local: Path, error: str | None) -> None:
    write_whole(answer_path(shared, host), {"id": request, "local": str(local), "error": error})


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    main()
