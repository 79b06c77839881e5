"""The table of the GPU tests on machines of no GPU to many, tried with small tests and a pretended number of GPUs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
from on_device.compared import at_least, at_most

pytestmark = pytest.mark.gpu

def test_good(check):
    check([at_least("speed", 1.5, 1)])

def test_bad(check):
    check([at_most("memory", 9, 8)])

@pytest.mark.gpus(2)
def test_wide(table):
    table("rate", 3, "no bound")

@pytest.mark.gpus(4)
def test_wider():
    pytest.skip("policy.precision is mxfp8; choose another")
"""
ON_CPU = """
def test_of_something_else():
    pass
"""
BAD = ["test_bad", "AssertionError: memory: 9, wanted at most 8", "FAILED"]


def run(directory: Path, gpus: int) -> tuple[int, list[list[str]]]:
    """Exit status and table of a run of TESTS where so many GPUs can be used."""
    shutil.copy(Path(__file__).with_name("conftest.py"), directory)
    (directory / "test_few.py").write_text(TESTS)
    (directory / "test_on_cpu.py").write_text(ON_CPU)
    (directory / "pretended.py").write_text(
        f"from exprl_megatron.utils import accelerator\naccelerator.gpu_count = lambda: {gpus}"
    )
    paths = f"{directory}:{Path(__file__).parents[1]}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "pretended",
        "-W",
        "ignore",
        str(directory),
    ]
    # What this run of pytest was given is not meant for that one.
    environment = {"PATH": "", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment)
    table = done.stdout.partition(" measured on this machine ")[2].partition("\n=")[0].splitlines()[1:]
    return done.returncode, [re.split("  +", line.strip()) for line in table]


NARROW = [
    ["speed", "1.5", "at least 1"],
    ["memory", "9", "at most 8", "WRONG"],
]


@pytest.mark.parametrize(
    ("gpus", "status", "rows"),
    [
        (
            0,
            pytest.ExitCode.NO_TESTS_COLLECTED,
            [
                ["test_good", "needs 1 GPU", "0 can be used here"],
                ["test_bad", "needs 1 GPU", "0 can be used here"],
                ["test_wide", "needs 2 GPUs", "0 can be used here"],
                ["test_wider", "needs 4 GPUs", "0 can be used here"],
            ],
        ),
        (
            1,
            pytest.ExitCode.TESTS_FAILED,
            [
                *NARROW,
                BAD,
                ["test_wide", "needs 2 GPUs", "1 can be used here"],
                ["test_wider", "needs 4 GPUs", "1 can be used here"],
            ],
        ),
        (
            2,
            pytest.ExitCode.TESTS_FAILED,
            [*NARROW, ["rate", "3", "no bound"], BAD, ["test_wider", "needs 4 GPUs", "2 can be used here"]],
        ),
        (
            4,
            pytest.ExitCode.TESTS_FAILED,
            [*NARROW, ["rate", "3", "no bound"], BAD, ["test_wider", "policy.precision is mxfp8", "choose another"]],
        ),
    ],
)
def test_every_test_is_a_measurement_a_failure_or_a_row_that_says_what_it_needs(tmp_path, gpus, status, rows):
    found_status, table = run(tmp_path, gpus)
    assert found_status == status
    assert table[0] == ["what", "measured", "wanted"]
    assert table[-1][0] == "all of it" and re.fullmatch(r"\d+ s", table[-1][1])
    assert table[1:-1] == rows
