"""The order of problems: every problem once an epoch, the same again from any position."""

import pytest

from exprl_megatron.problems.order import problem_indices


def test_each_epoch_holds_every_problem_once_in_an_order_of_its_own():
    epochs = [problem_indices(0, "priming", start, 50, 50) for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_cut_into_steps_gives_the_same_order():
    whole = problem_indices(3, "priming", 0, 40, 7)
    steps = [problem_indices(3, "priming", place, 4, 7) for place in range(0, 40, 4)]
    assert [i for step in steps for i in step] == whole
    assert problem_indices(3, "priming", 17, 9, 7) == whole[17:26]


def test_seed_and_stage_make_the_order():
    base = problem_indices(0, "priming", 0, 50, 50)
    assert base == problem_indices(0, "priming", 0, 50, 50)
    assert base != problem_indices(1, "priming", 0, 50, 50)
    assert base != problem_indices(0, "sparse", 0, 50, 50)


def test_the_order_is_the_same_on_every_machine():
    assert problem_indices(0, "priming", 0, 8, 8) == [2, 5, 6, 1, 4, 0, 7, 3]


def test_no_problems_are_refused():
    with pytest.raises(ValueError, match="no problems"):
        problem_indices(0, "priming", 0, 1, 0)
