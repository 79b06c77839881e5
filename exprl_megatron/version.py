"""Which exprl_megatron this is: its version, and the commit that it was installed or is run from."""

import json
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import exprl_megatron

_ROOT = Path(exprl_megatron.__file__).resolve().parents[1]
_GIT_S = 10.0


@dataclass(frozen=True)
class Build:
    """`commit` is None where nothing says which it is; `modified`: files differ from the commit."""

    version: str
    commit: str | None
    modified: bool

    def __str__(self) -> str:
        commit = "" if self.commit is None else f" ({self.commit[:12]}{', modified' if self.modified else ''})"
        return f"exprl_megatron {self.version}{commit}"


@cache
def this_build() -> Build:
    """Return the build that runs, as it was when first asked."""
    if (_ROOT / ".git").exists() and (commit := _git("rev-parse", "HEAD")):
        return Build(exprl_megatron.__version__, commit, bool(_git("status", "--porcelain", "--untracked-files=no")))
    return Build(exprl_megatron.__version__, _installed_commit(), False)


def package_versions() -> dict[str, str]:
    """Name and version of every package that is installed here."""
    found = {package.metadata["Name"]: package.version for package in distributions() if package.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _git(*arguments: str) -> str:
    """Return what git says of our files; nothing where it does not."""
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _installed_commit() -> str | None:
    """Return the commit that pip installed from a repository."""
    try:
        origin = json.loads(distribution("exprl-megatron").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    return origin.get("vcs_info", {}).get("commit_id")
