"""Runs mypy; no package may have more errors than tools/ratchet.json records, or any without a record."""

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from ratchet import Ratchet, package_of

_ERROR = re.compile(r"^(?P<path>[^:]+\.py):\d+: error: ")


def by_package(output: str) -> dict[str, list[str]]:
    """Return mypy's errors in each package."""
    lines = defaultdict(list)
    for line in output.splitlines():
        if found := _ERROR.match(line):
            lines[package_of(Path(found["path"]))].append(line)
    return lines


def main() -> int:
    """Check the counts or, with --update, record them; returns mypy's own status where it could not run."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--update", action="store_true", help="record today's counts; refused where their sum rises")
    update = options.parse_args().update
    done = subprocess.run([sys.executable, "-m", "mypy", "exprl_megatron"], capture_output=True, text=True, check=False)
    if done.returncode > 1 or done.stderr:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        return done.returncode or 1
    lines = by_package(done.stdout)
    return Ratchet("types").judge(
        {package: len(of_package) for package, of_package in lines.items()}, lines, update=update
    )


if __name__ == "__main__":
    sys.exit(main())
