"""tools/setup.sh says in one sentence what to install; tools/setup_te.sh says what it was doing and continues there."""

import shutil
import signal
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


STUBS = {
    # Makes the interpreter of the environment; installing succeeds.
    "build/uv/bin/uv": 'if [ "$1" = venv ]; then mkdir -p .venv-te/bin site; cp python-stub .venv-te/bin/python; fi',
    "python-stub": """case "$2" in
        *purelib*) echo site ;;
        *include*) echo headers ;;
        *EXT_SUFFIX*) echo .so ;;
        *) echo imported >>done ;;
    esac""",
    "build/uv/bin/pip": "echo fetched >>done; cp archive build/te/transformer_engine_torch-1.tar.gz",
    # `fails` has a line of each part that is not to succeed and what then happens.
    "bin/g++": """case "$*" in *-shared*) part=link ;; *first.cpp*) part=first ;; *) part=second ;; esac
    echo "$part" >>done
    touch "${!#}"
    while read -r name action; do [ "$name" != "$part" ] || eval "$action"; done <fails""",
}
"""What the script calls, as programs that note in the file `done` what they were asked to do."""


@pytest.fixture
def setup_te(tmp_path):
    """`setup_te(fails)` runs the script with the stubs: its result, and which parts of the work were done."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("tools/setup_te.sh", "setup.py", "exprl_megatron/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in STUBS.items():
        stub = tmp_path / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"#!/usr/bin/env bash\n{text}\n")
        stub.chmod(0o755)
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "patchlevel.h").write_text("3.12")
    for name in ("cast", "pybind"):
        (tmp_path / "source" / "csrc").mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / "csrc" / f"{name}.cpp").touch()
    subprocess.run(["tar", "czf", "archive", "source"], cwd=tmp_path, check=True)

    def run(fails: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "fails").write_text(f"{fails}\n")
        (tmp_path / "done").write_text("")
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        command = [str(tmp_path / "tools" / "setup_te.sh")]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        return ended, sorted((tmp_path / "done").read_text().split())

    return run


def test_the_environment_of_transformer_engine_is_made_once(setup_te):
    ended, done = setup_te()
    assert (ended.returncode, done) == (0, ["fetched", "first", "imported", "link", "second"])
    ended, done = setup_te()
    assert (ended.returncode, ended.stdout, done) == (0, "", [])


@pytest.mark.parametrize(
    ("fails", "status", "doing", "left"),
    [
        ("second exit 4", 4, "compiling", ["imported", "link", "second"]),
        ("first kill -9 $$", 128 + signal.SIGKILL, "compiling", ["first", "imported", "link"]),
        ("link exit 1", 1, "linking", ["imported", "link"]),
        # Whatever started the script ends it, as where its time is over.
        ("link kill $PPID; exec sleep 60", 128 + signal.SIGTERM, "linking", ["imported", "link"]),
    ],
)
def test_where_it_stops_it_says_at_what_and_continues_from_there(setup_te, fails, status, doing, left):
    ended, _ = setup_te(fails)
    assert ended.returncode == status
    assert (
        f"setup-te: stopped while {doing} Transformer Engine's torch extension (exit status {status};" in ended.stderr
    )
    ended, done = setup_te()
    assert (ended.returncode, done) == (0, left)
