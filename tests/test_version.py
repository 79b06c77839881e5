"""Which program ran, and how that is recorded."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import exprl_megatron
from exprl_megatron import version as module
from exprl_megatron.errors import RunStopped
from exprl_megatron.launch.run_record import RunRecord


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def build(monkeypatch):
    """`build(root)`: what this_build says of a program in `root`."""

    def of(root: Path) -> module.Build:
        monkeypatch.setattr(module, "_ROOT", root)
        module.this_build.cache_clear()
        return module.this_build()

    yield of
    monkeypatch.undo()
    module.this_build.cache_clear()


def test_the_commit_is_named_and_whether_files_differ_from_it(build, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert build(tmp_path) == module.Build(exprl_megatron.__version__, commit, modified=False)
    (tmp_path / "untracked").write_text("2")
    assert not build(tmp_path).modified
    (tmp_path / "a.py").write_text("2")
    assert str(build(tmp_path)) == f"exprl_megatron {exprl_megatron.__version__} ({commit[:12]}, modified)"


def test_a_program_without_a_repository_has_a_version_alone(build, tmp_path):
    assert str(build(tmp_path)) == f"exprl_megatron {exprl_megatron.__version__}"


def test_the_command_line_tells_the_version():
    command = [sys.executable, "-m", "exprl_megatron.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"exprl_megatron {exprl_megatron.__version__}")
    assert done.stdout.count("\n") == 1


def test_a_runs_record_says_what_ran_where_and_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exprl", "train", "a b.yaml"])
    path = tmp_path / "run.json"
    with RunRecord(path):
        record = json.loads(path.read_text())
        assert record["end"] is record["exit"] is None
    assert record["command"] == "exprl train 'a b.yaml'"
    assert record["host"] == os.uname().nodename
    assert record["packages"]["torch"] == version("torch")
    assert {"version", "commit", "modified", "python"} <= record.keys()
    with pytest.raises(RunStopped), RunRecord(path):
        raise RunStopped("A bound was passed.")
    second = json.loads(path.read_text())
    assert second["exit"] == {"status": 1, "message": "A bound was passed."}
    assert second["start"] <= second["end"] and second["end"].endswith("+00:00")
    assert [earlier["exit"]["status"] for earlier in second["earlier"]] == [0]


def test_a_record_that_cannot_be_completed_does_not_hide_what_ended_the_run(tmp_path, capsys):
    with pytest.raises(RunStopped), RunRecord(tmp_path / "run.json"):
        (tmp_path / "run.json.tmp").mkdir()
        raise RunStopped("A bound was passed.")
    assert "run.json was not completed" in capsys.readouterr().err


def test_a_record_that_is_damaged_does_not_keep_a_run_from_continuing(tmp_path):
    path = tmp_path / "run.json"
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with RunRecord(path):
            assert json.loads(path.read_text())["earlier"] == [{"unreadable": content}]
