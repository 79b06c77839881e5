import pytest

from exprl_megatron.judging.calibration import misplacement, wrong_references


def test_misplacement_reproduces_the_released_numbers():
    scores = [5, 4, 3, 1, 5, 2, None, 4]
    correct = [True, True, True, False, False, False, True, False]
    found = misplacement(scores, correct)
    assert found.false_negative == pytest.approx(1 / 3)
    assert found.false_positive == 0.5
    assert found.rate == pytest.approx(0.416667, abs=1e-6)


def test_a_judge_that_always_says_three_misplaces_half():
    found = misplacement([3, 3, 3, 3], [True, False, True, False])
    assert (found.false_negative, found.false_positive, found.rate) == (1.0, 0.0, 0.5)


def test_wrong_references_reproduce_the_released_map():
    keys = ["p1", "p2", "p3", "p4", "p5", "p6"]
    expected = {"p1": "p4", "p2": "p5", "p3": "p2", "p4": "p3", "p5": "p6", "p6": "p1"}
    assert wrong_references(keys) == expected
