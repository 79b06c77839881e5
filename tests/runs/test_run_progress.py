"""What a run knows of itself between two steps, two stages and two starts."""

import json

import pytest

from exprl_megatron.runs.progress import RunProgress, custom_stage_state, updates_of


def test_a_new_stage_begins_with_its_first_step_and_its_first_problem_and_keeps_the_counts_of_the_run():
    progress = RunProgress(1, 7, 9, 40, 80, 900, 3, 0.25)
    assert progress.after_stage() == RunProgress(2, 0, 9, 0, 80, 900, 3, 0.25)


def test_a_checkpoint_holds_it_whole():
    progress = RunProgress(1, 7, 9, 40, 80, 900, 3, 0.25)
    assert RunProgress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress


@pytest.mark.parametrize("key", ["custom_stage", "own_stage"])
def test_the_state_of_a_custom_stage_is_read_from_checkpoints_of_this_and_of_earlier_versions(key):
    record = RunProgress(step=2).to_dict() | {key: {"seen": 4}}
    assert custom_stage_state(record) == {"seen": 4}
    assert RunProgress.from_dict(record) == RunProgress(step=2)


def test_a_checkpoint_of_a_built_in_stage_has_no_such_state():
    assert custom_stage_state(RunProgress().to_dict()) == {}


def test_weights_are_named_after_the_updates_that_made_them():
    assert RunProgress(updates=12).weight_version == "v12"
    assert updates_of("v12") == 12
