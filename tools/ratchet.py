"""Numbers of errors in each package, which may only fall; kept in tools/ratchet.json."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RECORD = Path(__file__).with_name("ratchet.json")


def tracked_files(of: Sequence[str] = ()) -> list[Path]:
    """Return the files in git, or those of the files and folders `of`; relative to the working directory, the project's
    root.
    """
    listed = subprocess.run(["git", "ls-files", "-z", *of], check=True, capture_output=True, text=True).stdout
    return [path for path in map(Path, listed.split("\0")) if path.name and path.is_file()]


def package_of(path: Path) -> str:
    """Return the package, or the directory at the root, of a file: `exprl_megatron/judging`, `tools`, `.`."""
    depth = 2 if path.parts[0] == "exprl_megatron" else 1
    return "/".join(path.parts[:-1][:depth]) or "."


class Ratchet:
    """The recorded counts of one kind, `words` or `types`.

    A package that has no record must be clean. A move between packages is recorded with `update`, as long as the sum of
    all packages does not rise.
    """

    def __init__(self, kind: str, record: Path = RECORD) -> None:
        self._kind = kind
        self._record = record
        self._all: dict[str, dict[str, int]] = json.loads(record.read_text(encoding="utf-8"))
        self._bounds = self._all.get(kind, {})

    def judge(self, counts: Mapping[str, int], lines: Mapping[str, Sequence[str]], *, update: bool) -> int:
        """Return the exit status for `counts` of each package, whose `lines` are printed where a package has too many.

        With `update` the counts become the record instead; 1 if their sum is above the recorded one.
        """
        if update:
            return self._write(counts)
        over = {package: count for package, count in counts.items() if count > self._bounds.get(package, 0)}
        for package, count in sorted(over.items()):
            print(*lines[package], sep="\n")
            bound = self._bounds.get(package, 0)
            print(f"{package}: {count} {self._kind}, and {bound} are allowed; fix what you added.", file=sys.stderr)
        if not over and sum(counts.values()) < sum(self._bounds.values()):
            print(f"{self._kind}: {sum(counts.values())} left; lower the bounds with 'make ratchet'.")
        return int(bool(over))

    def _write(self, counts: Mapping[str, int]) -> int:
        before, after = sum(self._bounds.values()), sum(counts.values())
        if self._bounds and after > before:
            print(f"{self._kind}: {after} instead of {before}; the sum may only fall.", file=sys.stderr)
            return 1
        self._all[self._kind] = {package: count for package, count in sorted(counts.items()) if count}
        self._record.write_text(json.dumps(self._all, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return 0
