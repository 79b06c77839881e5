"""DAPO's soft overlong punishment: its equation, the advantages that it gives, and what it leaves alone."""

from statistics import mean, stdev

import pytest
from helpers.graded import graded, stage

from exprl_megatron.algorithms.scores import soft_overlong_punishment
from exprl_megatron.errors import UserError
from exprl_megatron.rollout.group import Group
from exprl_megatron.training.statistics import step_statistics
from exprl_megatron.training.train_samples import token_advantages

SAMPLING = {"max_new_tokens": 100}


def test_the_punishment_is_the_equation_of_the_paper():
    lengths = [1, 16383, 16384, 17408, 18432, 19456, 20480, 20481]
    assert soft_overlong_punishment(lengths, 20480, 4096).tolist() == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1]


def test_the_punishment_is_that_of_trl():
    # trl 1.16.0: get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20).
    assert soft_overlong_punishment([80, 81, 90, 99, 100, 101], 100, 20).tolist() == [0, -0.05, -0.5, -0.95, -1, -1]


def test_the_punishment_is_that_of_verl():
    # verl 1dda039, reward_manager/dapo.py with max_resp_len 20480, overlong_buffer.len 4096, penalty_factor 1.0.
    lengths = [1, 16384, 16385, 17000, 20000, 20479, 20480]
    expected = [0, 0, -0.000244140625, -0.150390625, -0.8828125, -0.999755859375, -1]
    assert soft_overlong_punishment(lengths, 20480, 4096).tolist() == expected


def advantages(stage_, *members):
    (rows,) = token_advantages(stage_, [Group("p", members)])
    return [None if row is None else float(row[0]) for row in rows]


def test_dapo_has_the_advantages_of_its_paper():
    """Rewards of 1 and -1 plus R_length, normalized within the group."""
    rewards = {(1.0, 50): 1.0, (1.0, 90): 1.0 - 0.5, (0.0, 85): -1.0 - 0.25, (0.0, 100): -1.0 - 1.0}
    members = [graded(i, score, tokens) for i, (score, tokens) in enumerate(rewards)]
    expected = [(r - mean(rewards.values())) / stdev(rewards.values()) for r in rewards.values()]
    assert advantages(stage("sparse-rl", algorithm="dapo", sampling=SAMPLING), *members) == pytest.approx(
        expected, abs=1e-5
    )


def test_dapo_has_the_advantages_of_verl_s_script():
    """run_dapo_qwen2.5_32b.sh: rewards of 1 and -1 (reward_score/math_dapo.py), 4,096 of 20,480 tokens and a factor of
    1. Here a sixteenth of all lengths."""
    traces = [(1.0, 17408), (0.0, 20000), (1.0, 304), (0.0, 16384)]
    members = [graded(i, score, tokens // 16) for i, (score, tokens) in enumerate(traces)]
    rewards = [0.75, -1.8828125, 1.0, -1.0]
    expected = [(reward - mean(rewards)) / stdev(rewards) for reward in rewards]
    found = stage("sparse-rl", algorithm="dapo", sampling={"max_new_tokens": 20480 // 16})
    assert advantages(found, *members) == pytest.approx(expected, abs=1e-5)


def test_an_abstention_is_not_punished_but_left_out():
    found = stage("sparse-rl", soft_overlong={"cache": 20}, sampling=SAMPLING)
    members = [graded(0, 1.0, 100), graded(1, None, 100), graded(2, 0.0, 10)]
    assert advantages(found, *members) == [0.25, None, -0.25]


# By the rule and the punishment: (0 or 0.75) - 0.5, 0.25 - 0.25, 0.5.
@pytest.mark.parametrize(
    ("overlong", "scores"), [("zero", [-0.5, 0.0, 0.5]), ("score", [0.25, 0.0, 0.5]), ("exclude", [None, 0.0, 0.5])]
)
def test_a_judge_s_scores_are_punished_after_what_overlong_makes_of_them(overlong, scores):
    settings = {"overlong": overlong, "advantage": "mean-centered", "soft_overlong": {"cache": 20, "penalty": 0.5}}
    cut, near, short = graded(0, 0.75, 100, "length"), graded(1, 0.25, 90), graded(2, 0.5, 10)
    center = mean(score for score in scores if score is not None)
    expected = [None if score is None else pytest.approx(score - center) for score in scores]
    assert advantages(stage("exprl-outcome", sampling=SAMPLING, **settings), cut, near, short) == expected


def test_without_the_setting_length_costs_nothing():
    members = [graded(0, 1.0, 100), graded(1, 1.0, 10)]
    assert advantages(stage("sparse-rl", sampling=SAMPLING), *members) == [0.0, 0.0]
    assert "reward/overlong_punishment" not in step_statistics(stage("sparse-rl"), [Group("p", tuple(members))])


def test_the_logs_show_what_is_taken_off_and_from_how_many():
    members = (graded(0, 1.0, 100), graded(1, 0.0, 90), graded(2, 0.0, 10), graded(3, None, 100), graded(4, 1.0, 80))
    found = step_statistics(
        stage("sparse-rl", soft_overlong={"cache": 20, "penalty": 1.0}, sampling=SAMPLING), [Group("p", members)]
    )
    assert found["reward/overlong_punishment"] == pytest.approx(-(1 + 0.5) / 4)
    assert (found["length/punished"], found["reward/mean"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("sparse-rl", {"soft_overlong": {"max_length": 101}}, r"max_length is 101, but no trace has more than"),
        ("exprl-outcome", {"soft_overlong": {"max_length": 50, "cache": 51}}, "cache is 51, more than the 50 tokens"),
        ("sparse-rl", {"soft_overlong": {"cache": 101}}, "cache is 101, more than the 100 tokens"),
        ("exprl-process", {"soft_overlong": {}}, "soft_overlong"),
    ],
)
def test_lengths_that_do_not_go_with_the_sampling_are_refused(kind, settings, said):
    with pytest.raises(UserError, match=said):
        stage(kind, sampling=SAMPLING, **settings)
