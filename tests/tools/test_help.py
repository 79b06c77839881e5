"""Every program in tools/ answers --help before it does anything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PROGRAMS = sorted(path for path in TOOLS.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))


def test_every_program_reads_its_arguments():
    assert len(PROGRAMS) > 30
    texts = {path.name: path.read_text(encoding="utf-8") for path in PROGRAMS}
    assert [name for name, text in texts.items() if "ArgumentParser(" not in text and "yper(" not in text] == []


@pytest.mark.parametrize("name", ["make_reference.py", "find_browser.py"])
def test_help_is_printed_and_nothing_is_done(name):
    ended = subprocess.run(
        [sys.executable, str(TOOLS / name), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(TOOLS.parent)},
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"usage: {name}") and len(ended.stdout.splitlines()) > 3
