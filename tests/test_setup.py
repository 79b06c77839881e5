"""tools/setup.sh on a machine that lacks something says in one sentence what to install."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "cat", "dirname", "env", "sha256sum")


@pytest.fixture
def setup(tmp_path):
    """`setup(**environment)` runs the script in a bare copy of the project, with nothing but TOOLS on the PATH."""
    for name in ("tools/setup.sh", "requirements/cpu.txt", "setup.py", "exprl_megatron/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    path = tmp_path / "bin"
    path.mkdir()
    for tool in TOOLS:
        (path / tool).symlink_to(shutil.which(tool))

    def run(**environment: str) -> subprocess.CompletedProcess:
        bare = {"HOME": str(tmp_path), "PATH": str(path)} | environment
        return subprocess.run([str(tmp_path / "tools" / "setup.sh")], env=bare, capture_output=True, text=True)

    return run


def test_without_python_3_12_it_says_how_to_get_it(setup):
    done = setup()
    # A system-wide installation in a usual place is found all the same.
    if "C compiler" not in done.stderr:
        assert done.stderr.startswith("setup: Python 3.12 was not found; install it")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1


def test_without_a_compiler_it_says_how_to_get_one(setup):
    done = setup(PYTHON=sys.executable)
    assert done.stderr == "setup: no C compiler was found; install one with 'apt-get install build-essential'.\n"
    assert done.returncode == 1
