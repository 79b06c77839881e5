"""What the table of the GPU tests shows, tried with three small tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.gpu
def test_good(table):
    table("speed", 1.5, "at least 1")

@pytest.mark.gpu
def test_bad(table):
    table("memory", 9, "at most 8")
    assert 9 <= 8

@pytest.mark.gpu
def test_elsewhere():
    pytest.skip("needs a CUDA device")

def test_of_something_else():
    assert False
"""


def test_the_table_has_measurements_and_the_tests_that_gave_no_result(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_three.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path)]
    # What this run of pytest was told is not meant for that one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    table = done.stdout.partition(" measured on this machine ")[2].partition("\n=")[0].splitlines()[1:]
    assert [re.split("  +", line) for line in table] == [
        ["what", "measured", "wanted"],
        ["speed", "1.5", "at least 1"],
        ["memory", "9", "at most 8"],
        ["test_bad", "FAILED", "assert 9 <= 8"],
        ["test_elsewhere", "SKIPPED", "Skipped: needs a CUDA device"],
    ]
