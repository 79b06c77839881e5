"""A refusal of tools/convert_checkpoint.py is one line on stderr, without the empty line of an unstarted bar."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["to-hf", "verify"])
def test_a_refusal_is_one_line(tmp_path, command):
    arguments = [sys.executable, str(TOOL), command, str(tmp_path / "nope"), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"exprl: {tmp_path}/nope is no model directory")
