"""What a run knows of itself between two steps, two stages and two starts."""

import json

from exprl_megatron.runs.progress import RunProgress, updates_of


def test_a_new_stage_begins_with_its_first_step_and_its_first_problem_and_keeps_the_counts_of_the_run():
    progress = RunProgress(1, 7, 9, 40, 80, 900, 3, 0.25)
    assert progress.after_stage() == RunProgress(2, 0, 9, 0, 80, 900, 3, 0.25)


def test_a_checkpoint_holds_it_whole():
    progress = RunProgress(1, 7, 9, 40, 80, 900, 3, 0.25)
    assert RunProgress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress


def test_weights_are_named_after_the_updates_that_made_them():
    assert RunProgress(updates=12).weight_version == "v12"
    assert updates_of("v12") == 12
