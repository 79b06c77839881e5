"""The lines with which a run's log ends."""

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training.first_update import AssertionCounts
from exprl_megatron.training.run_logger import RunLogger


def closing_lines(directory, debug):
    stage = {"kind": "sparse-rl", "name": "sparse", "steps": 1, "problems": {"source": "p"}, "problems_per_step": 1}
    tree = {"directory": str(directory), "policy": {"model": "m"}, "trackers": [], "debug": debug, "stages": [stage]}
    paths = RunDirectory(directory)
    paths.logs.mkdir(parents=True)
    asserted = AssertionCounts()
    asserted.synced({"sync/seconds": 1.0})
    logger = RunLogger(check_config(tree, "test"), paths, RunProgress())
    logger.closing({}, asserted)
    logger.close()
    return paths.run_log.read_text().splitlines()


@pytest.mark.parametrize("asserts", [True, False])
def test_a_run_that_checks_itself_ends_with_what_was_compared(tmp_path, asserts):
    lines = [line for line in closing_lines(tmp_path / "run", {"assertions": asserts}) if "debug.assertions" in line]
    assert len(lines) == asserts
    assert all("nothing differed in 1 weight syncs" in line for line in lines)
