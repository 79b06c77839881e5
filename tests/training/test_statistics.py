import math

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.mismatch import check_log_prob_gap
from exprl_megatron.training.sequences import group_advantages, sequences_of
from exprl_megatron.training.statistics import group_statistics, update_statistics


def group(*verdicts, finish="stop", tokens=3) -> Group:
    members = []
    for i, verdict in enumerate(verdicts):
        trace = Trace("p", i, (1,), (5,) * tokens, (-0.5,) * tokens, "t", finish, (("v0", 0, tokens),))
        judgement = Abstained("timeout") if verdict is None else Scored(verdict)
        members.append(GradedTrace(trace, judgement))
    return Group("p", tuple(members))


def stage(kind, **changes):
    tree = {
        "directory": "d",
        "policy": {"model": "m"},
        "judge": {"model": "j"},
        "stages": [{"kind": kind, "name": "a", "steps": 3, "problems": {"source": "x"}} | changes],
    }
    return check_config(tree, "test").stages[0]


def test_outcome_advantages_reproduce_the_papers_group_of_four():
    found = group_advantages(stage("exprl-outcome"), group(0.0, 0.5, 0.75, 1.0)).tolist()
    expected = [-1.317462, -0.146385, 0.439154, 1.024693]
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(found, expected, strict=True))


def test_sparse_advantages_are_centred_and_not_scaled():
    found = group_advantages(stage("sparse-rl"), group(1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)).tolist()
    assert found == [0.75, -0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25]


def test_an_abstention_leaves_loss_and_statistics():
    with_abstention = sequences_of(stage("sparse-rl"), [group(1.0, None, 0.0)])
    without = sequences_of(stage("sparse-rl"), [group(1.0, 0.0)])
    assert [s.advantages for s in with_abstention] == [s.advantages for s in without] == [(0.5,) * 3, (-0.5,) * 3]


def test_an_overlong_trace_scores_zero_under_the_judge_and_keeps_its_score_under_the_verifier():
    cut = group(1.0, 0.0, finish="length")
    assert group_advantages(stage("exprl-outcome"), cut).tolist() == [0.0, 0.0]
    assert group_advantages(stage("sparse-rl"), cut).tolist() == [0.5, -0.5]


def test_statistics_count_abstentions_by_reason_and_groups_with_a_success():
    found = group_statistics([group(1.0, 0.0, None, None), group(0.0, 0.0, 0.0, 0.0)])
    assert found["reward/abstained"] == found["abstained/timeout"] == 0.25
    assert found["reward/mean"] == 1 / 6
    assert found["reward/mixed_groups"] == found["reward/groups_with_success"] == 0.5
    assert found["length/mean"] == 3


def test_sums_become_token_means_and_maxima_stay():
    found = update_statistics({"loss": 6.0, "sampler_gap/max": 0.5}, tokens=4)
    assert found == {"loss": 1.5, "sampler_gap/max": 0.5, "tokens": 4}


def test_a_gap_between_trainer_and_sampler_above_the_bound_stops_the_run():
    check_log_prob_gap({"sampler_gap/mean": 9e-5}, 1e-4)
    check_log_prob_gap({"sampler_gap/mean": 9.0}, None)
    with pytest.raises(RunStopped, match=r"differ by 1\.10e-04 on average, more than sync\.max_log_prob_gap"):
        check_log_prob_gap({"sampler_gap/mean": 1.1e-4}, 1e-4)
