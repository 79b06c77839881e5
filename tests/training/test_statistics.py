import math
from dataclasses import replace

import pytest
from helpers.graded import cut, graded, group

from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.judgement import Abstained
from exprl_megatron.rollout.group import Group
from exprl_megatron.training.log_prob_gap import check_log_prob_gap
from exprl_megatron.training.statistics import group_statistics, staleness_statistics, update_statistics


def test_statistics_count_abstentions_by_reason_and_groups_with_a_success():
    found = group_statistics([group(1.0, 0.0, None, None), group(0.0, 0.0, 0.0, 0.0)])
    assert found["reward/abstained"] == found["abstained/timeout"] == 0.25
    assert found["reward/mean"] == 1 / 6
    assert found["reward/mixed_groups"] == found["reward/groups_with_success"] == 0.5
    assert found["length/mean"] == 3


def test_lengths_and_overlong_traces():
    members = (graded(0, 1.0, tokens=2), graded(1, 1.0, tokens=6, finish="length"))
    found = group_statistics([Group("p", members)])
    assert (found["length/mean"], found["length/max"], found["length/overlong"]) == (4, 6, 0.5)


def test_the_share_of_prompt_tokens_that_were_in_the_cache():
    read = graded(0, 1.0)
    cached = replace(read, trace=replace(read.trace, sample=1, prompt_ids=(1, 2, 3), cached_tokens=2))
    assert group_statistics([Group("p", (read, cached))])["prompt/cached"] == 2 / 4


def test_groups_all_right_and_all_wrong_by_a_verifier_that_is_the_grader():
    found = group_statistics([group(1.0, 1.0), group(0.0, None), group(1.0, 0.0), group(None, None)])
    assert found["verifier/right"] == 3 / 5
    assert found["verifier/all_right_groups"] == found["verifier/all_wrong_groups"] == 1 / 3
    assert found["verifier/abstained"] == 3 / 8
    assert not [name for name in found if name.startswith(("score/", "segments/", "judge/"))]


def test_groups_all_right_and_all_wrong_by_a_verifier_beside_the_judge():
    groups = [
        Group("p", (cut(0, (1.0, 1), right=0.0), cut(1, (1.0, 1), right=0.0))),
        Group("q", (cut(0, (0.0, 1), right=1.0), cut(1, (1.0, 1), right=None))),
    ]
    found = group_statistics(groups, judged=True)
    assert found["verifier/right"] == 1 / 3
    assert found["verifier/all_right_groups"] == found["verifier/all_wrong_groups"] == 0.5
    assert found["verifier/abstained"] == 0.25
    assert found["reward/groups_with_success"] == 1.0


def test_segments_are_counted_and_the_first_ones_share_of_tokens():
    traces = [cut(0, (0.5, 4)), cut(1, (0.5, 1), (0.5, 2), (0.5, 1)), cut(2, *[(0.5, 1)] * 12)]
    found = group_statistics([Group("p", tuple(traces)), group(1.0)], judged=True)
    assert found["segments/mean"] == 16 / 3
    assert found["segments/single_share"] == found["segments/count_1"] == found["segments/count_3"] == 1 / 3
    assert found["segments/count_over_10"] == 1 / 3
    assert sum(value for name, value in found.items() if name.startswith("segments/count_")) == pytest.approx(1)
    assert found["segments/first_token_share"] == (4 + 1 + 1) / (4 + 4 + 12)


def test_scores_of_everything_that_was_judged():
    segmented = Group("p", (cut(0, (0.0, 1), (1.0, 1)), cut(1, (0.25, 1), (None, 1))))
    whole = Group("q", (graded(0, 0.5), graded(1, 0.6)))
    found = group_statistics([segmented, whole], judged=True)
    assert [found[f"score/{grade}"] for grade in range(1, 6)] == [0.2, 0.2, 0.4, 0, 0.2]
    assert found["score/units"] == 6
    assert found["score/abstained"] == pytest.approx(1 / 6)
    assert found["score/mean"] == pytest.approx(2.35 / 5)
    of_segments = math.sqrt(((0 - 5 / 12) ** 2 + (1 - 5 / 12) ** 2 + (0.25 - 5 / 12) ** 2) / 3)
    assert found["score/std_within_prompt"] == pytest.approx((of_segments + 0.05) / 2)


def test_a_step_in_which_the_judge_only_abstained_has_statistics():
    found = group_statistics([Group("p", (cut(0, (None, 2)), cut(1, (None, 1))))], judged=True)
    assert found["score/abstained"] == found["reward/abstained"] == found["abstained/timeout"] == 1
    assert "score/mean" not in found


def test_auroc_of_the_judge_against_the_verifier_needs_both_classes():
    scored = [cut(0, (0.75, 1), right=1.0), cut(1, (0.25, 1), right=0.0), cut(2, (0.75, 1), right=0.0)]
    unknown = [cut(3, (1.0, 1)), cut(4, (None, 1), right=1.0)]
    assert group_statistics([Group("p", (*scored, *unknown))], judged=True)["judge/auroc"] == 0.75
    assert "judge/auroc" not in group_statistics([Group("p", (*scored[1:], *unknown))], judged=True)


def test_reasons_of_abstentions_are_distinguished():
    traces = (graded(0, None), graded(1, None), graded(2, 1.0))
    refused = replace(graded(3, None), judgement=Abstained("refused"))
    found = group_statistics([Group("p", (*traces, refused))], judged=True)
    assert (found["abstained/timeout"], found["abstained/refused"]) == (0.5, 0.25)


def test_staleness_is_counted_by_token_in_optimizer_steps():
    member = graded(0, 1.0, tokens=4)
    changed = replace(member.trace, weight_versions=(("v7", 0, 1), ("v9", 1, 4)))
    whole = replace(graded(1, 1.0, tokens=2).trace, weight_versions=(("v9", 0, 2),))
    found = staleness_statistics([Group("p", tuple(replace(member, trace=t) for t in (changed, whole)))], updates=10)
    assert found == {"staleness/mean": (3 + 3 * 1 + 2 * 1) / 6, "staleness/max": 3.0, "staleness/mixed": 0.5}


def test_sums_become_token_means_and_maxima_stay():
    found = update_statistics({"loss": 6.0, "sampler_gap/max": 0.5}, tokens=4)
    assert found == {"loss": 1.5, "sampler_gap/max": 0.5, "tokens": 4}


def test_the_gap_to_the_sampler_is_a_mean_over_the_tokens_that_were_compared():
    found = update_statistics({"sampler_gap/mean": 6.0, "sampler_gap/max": 5.0, "sampler_gap/tokens": 3.0}, tokens=4)
    assert found == {"sampler_gap/mean": 2.0, "sampler_gap/max": 5.0, "sampler_gap/tokens": 3.0, "tokens": 4}
    assert update_statistics({"sampler_gap/mean": 0.0, "sampler_gap/tokens": 0.0}, tokens=4) == {"tokens": 4}


def test_losses_are_divided_by_their_own_denominator():
    sums = {"loss": 6.0, "loss/policy": 4.0, "entropy": 8.0, "clip_share": 2.0}
    found = update_statistics(sums, tokens=4, denominator=2.0)
    assert found == {"loss": 3.0, "loss/policy": 2.0, "entropy": 2.0, "clip_share": 0.5, "tokens": 4}


def test_shares_of_padding_are_kept_as_they_are():
    found = update_statistics({"padding/padded": 0.4, "padding/packed": 0.01}, tokens=4, denominator=2.0)
    assert found == {"padding/padded": 0.4, "padding/packed": 0.01, "tokens": 4}


def test_a_gap_that_is_not_a_number_stops_the_run():
    for gap in (float("nan"), float("inf")):
        with pytest.raises(RunStopped, match="differ by"):
            check_log_prob_gap({"sampler_gap/mean": gap}, 1e-4)


def test_a_gap_between_trainer_and_sampler_above_the_bound_stops_the_run():
    check_log_prob_gap({"sampler_gap/mean": 9e-5}, 1e-4)
    check_log_prob_gap({"sampler_gap/mean": 9.0}, None)
    with pytest.raises(RunStopped, match=r"differ by 1\.10e-04 on average, more than sync\.max_log_prob_gap"):
        check_log_prob_gap({"sampler_gap/mean": 1.1e-4}, 1e-4)


def test_the_effective_share_of_weighted_tokens_is_kishs():
    # weights 2, 1, 1, 0: (mean 1) ** 2 / (mean of squares 1.5)
    found = update_statistics({"correction/weight": 4.0, "correction/squared": 6.0}, tokens=4)
    assert found == {"correction/weight": 1.0, "correction/effective": pytest.approx(2 / 3), "tokens": 4}
    # weights 4, 2, 2, 0: twice as large and as unequal as before
    doubled = update_statistics({"correction/weight": 8.0, "correction/squared": 24.0}, tokens=4)
    assert doubled["correction/effective"] == pytest.approx(2 / 3)
    nothing = update_statistics({"correction/weight": 0.0, "correction/squared": 0.0}, tokens=4)
    assert nothing["correction/effective"] == 0
