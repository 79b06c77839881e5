import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.graded import cut, graded, group, stage

from exprl_megatron.rollout.group import Group
from exprl_megatron.training.teacher import student_and_teacher
from exprl_megatron.training.train_samples import token_advantages, update_samples

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "exprl_vectors.json").read_text())
SPANS = (("v1", 0, 1), ("v2", 1, 3))


def close(expected):
    """Within what the 1e-6 beside the std makes of a closed form."""
    return pytest.approx(expected, abs=5e-6)


def sequences_of(stage_, groups):
    """Of a stage with one update a step."""
    (sequences,) = update_samples(stage_, groups)
    return sequences


def advantages_of(stage_, groups) -> list[list[float]]:
    return [sequence.advantages.tolist() for sequence in sequences_of(stage_, groups)]


def first_tokens(stage_, *groups) -> list[float | None]:
    return [None if row is None else float(row[0]) for rows in token_advantages(stage_, list(groups)) for row in rows]


@pytest.mark.parametrize("variant", ["recommended", "code"])
@pytest.mark.parametrize("case", VECTORS["Outcome_grpo"]["cases"], ids=lambda case: case["name"])
def test_outcome_advantages_reproduce_the_papers(case, variant):
    rows = zip(case["uid"], case["raw"], case["lengths"], strict=True)
    members = {name: [] for name in dict.fromkeys(case["uid"])}
    for name, raw, length in rows:
        finish = "length" if length == case["max_len"] else "stop"
        members[name].append(graded(0, (raw - 1) / 4, length, finish))
    groups = [Group(name, tuple(of)) for name, of in members.items()]
    found = [first for one in groups for first in first_tokens(stage("exprl-outcome", variant=variant), one)]
    expected = case["code_seq_adv" if variant == "code" else "recommended_seq_adv_excluding_unparsed"]
    assert found == pytest.approx(expected, abs=1e-6)


def test_an_abstention_leaves_loss_and_statistics_but_in_the_released_form_only_the_loss():
    recommended = first_tokens(stage("exprl-outcome"), group(1.0, None, 0.0))
    assert recommended == [close(2**-0.5), None, close(-(2**-0.5))]
    code = first_tokens(stage("exprl-outcome", variant="code"), group(1.0, None, 0.0))
    assert code == [close(2 / 3**0.5), None, close(-1 / 3**0.5)]


def test_samples_have_the_experts_of_their_traces():
    made = group(1.0, 0.0)
    experts = [np.full((3, 2, 1), k, np.uint8) for k in (1, 2)]
    members = (
        replace(member, trace=replace(member.trace, routed_experts=rows))
        for member, rows in zip(made.samples, experts, strict=True)
    )
    samples = sequences_of(stage("sparse-rl"), [replace(made, samples=tuple(members))])
    assert [np.array_equal(s.routed_experts, rows) for s, rows in zip(samples, experts, strict=True)] == [True] * 2
    assert [s.routed_experts for s in sequences_of(stage("sparse-rl"), [made])] == [None, None]


def test_samples_name_their_groups_and_traces_in_the_rollout_log_whichever_update_they_are_in():
    groups = [group(1.0, None), group(0.0, 1.0)]
    first, second = update_samples(stage("sparse-rl", updates_per_step=2), groups)
    assert [[sample.place for sample in update] for update in (first, second)] == [[(0, 0)], [(1, 0), (1, 1)]]


def test_sparse_advantages_are_centered_and_not_scaled():
    found = first_tokens(stage("sparse-rl"), group(1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    assert found == [0.75, -0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25]


def test_an_abstention_is_not_a_sequence():
    with_abstention = advantages_of(stage("sparse-rl"), [group(1.0, None, 0.0)])
    without = advantages_of(stage("sparse-rl"), [group(1.0, 0.0)])
    assert with_abstention == without == [[0.5] * 3, [-0.5] * 3]


def test_overlong_traces_of_stages_judged_whole():
    ends = Group("p", (graded(0, 1.0, finish="length"), graded(1, 1.0), graded(2, 0.0)))
    assert first_tokens(stage("exprl-outcome"), ends) == close([-1 / 3**0.5, 2 / 3**0.5, -1 / 3**0.5])
    assert first_tokens(stage("exprl-outcome", overlong="score"), ends)[0] == close(1 / 3**0.5)
    assert first_tokens(stage("exprl-outcome", overlong="exclude"), ends) == [None, close(2**-0.5), close(-(2**-0.5))]
    assert first_tokens(stage("sparse-rl"), ends) == close([1 / 3, 1 / 3, -2 / 3])
    assert first_tokens(stage("sparse-rl", overlong="exclude"), ends) == [None, 0.5, -0.5]


def test_the_stage_names_the_estimator_and_a_batch_is_the_whole_step():
    groups = [group(1.0, 0.0), group(0.0, 0.0)]
    split = update_samples(stage("sparse-rl", advantage="batch-normalized", updates_per_step=2), groups)
    std = (3 * 0.25**2 + 0.75**2) ** 0.5 / 3**0.5
    found = [[s.advantages[0] for s in part] for part in split]
    assert found == [close([0.75 / std, -0.25 / std]), close([-0.25 / std, -0.25 / std])]
    assert first_tokens(stage("sparse-rl", advantage="leave-one-out"), group(1.0, 0.0, 0.0)) == close([1, -0.5, -0.5])


def test_updates_share_the_groups_in_their_order():
    groups = [group(score, 0.0) for score in (0.1, 0.2, 0.3, 0.4, 0.5)]
    parts = update_samples(stage("sparse-rl", updates_per_step=2), groups)
    assert [[s.advantages[0] for s in part[::2]] for part in parts] == [close([0.05, 0.1]), close([0.15, 0.2, 0.25])]
    assert update_samples(stage("sparse-rl", updates_per_step=2), [group(None, None)] * 2) == [[], []]
    assert update_samples(stage("exprl-process"), []) == [[]]


def test_self_distillation_takes_every_trace_and_needs_no_judgement():
    graded_or_not = group(None, 1.0, finish="length")
    sequences, _ = student_and_teacher([graded_or_not], {graded_or_not.problem_id: (1,)})
    assert [s.advantages for s in sequences] == [None, None]
    assert sequences[0].rollout_log_probs.tolist() == [-0.5] * 3


def test_process_advantages_go_to_the_tokens_of_their_segments():
    traces = Group("p", (cut(0, (0.5, 3), (1.0, 3), (0.75, 1)), cut(1, (0.75, 2)), cut(2, (0.5, 1), (None, 2))))
    delta = sequences_of(stage("exprl-process"), [traces])
    assert [s.advantages.tolist() for s in delta] == [close([-0.25] * 3 + [0.5] * 3 + [-0.25]), close([0, 0])]
    code = advantages_of(stage("exprl-process", variant="code"), [traces])
    assert code == [close([-0.25] * 3 + [0.5] * 3 + [-0.25]), close([0.75] * 2)]
    assert [s.response_ids.tolist() for s in delta] == [m.trace.token_ids.tolist() for m in traces.samples[:2]]


def test_process_settings_reach_the_estimator():
    group_ = Group("p", (cut(0, (0.5, 1), (1.0, 1)), cut(1, (0.25, 2), finish="length")))
    penalized = advantages_of(stage("exprl-process", overlong="penalize"), [group_])
    assert penalized[1] == close([-0.625] * 2)
    assert len(sequences_of(stage("exprl-process", overlong="exclude"), [group_])) == 1
    ended = advantages_of(stage("exprl-process", estimator="end", variant="code"), [group_])
    assert ended == [close([-0.5, 0]), close([-0.25] * 2)]
    padded = advantages_of(
        stage("exprl-process", estimator="group", variant="code", sampling={"max_new_tokens": 10}), [group_]
    )
    assert padded[0] == close([0.5 - 0.0375, 1 - 0.0375])


@pytest.mark.parametrize(
    ("variant", "code_group"),
    [("code", [[0, 0, 1.0], [0, 0, 0.25]]), ("recommended", [[2**-0.5] * 3, [-(2**-0.5)] * 3])],
)
def test_domains_of_a_step_are_routed_to_their_own_estimators(variant, code_group):
    case = VECTORS["mixed_delta_process"]
    assert case["code_token_adv"][1] == [0, 0, 1.0]
    routes = {
        "code": {"granularity": "trace", "estimator": "outcome"},
        "science": {"granularity": "segment", "estimator": "basic"},
    }
    mixed = stage("exprl-process", variant=variant, routes=routes)
    math = Group("m", (cut(0, (0.25, 2), (0.75, 1)), cut(1, (0.5, 1), (0.5, 1))))
    code = group(1.0, 0.25, domain="code")
    science = Group("s", (cut(0, (0.5, 1), (1.0, 1)), cut(1, (0.75, 1))), domain="science")
    found = advantages_of(mixed, [code, math, science, math])
    assert found[:2] == [close(row) for row in code_group]
    assert found[2] == close(case["code_token_adv"][0])
    assert found[3:6] == [[0.0, 0.0], [0.5, 1.0], [0.75]]
    assert found[6:] == found[2:4]


def test_routed_outcomes_that_are_overlong_or_abstained():
    routes = {"code": {"granularity": "trace", "estimator": "outcome"}}
    members = (graded(0, 1.0, finish="length"), graded(1, 1.0), graded(2, 0.5), graded(3, None))
    code = Group("c", members, "code")
    zero = first_tokens(stage("exprl-process", routes=routes), code)
    assert zero == [close(-1.0), close(1.0), close(0.0), None]
    excluded = first_tokens(stage("exprl-process", routes=routes, overlong="exclude"), code)
    assert excluded[0] is None and excluded[1] == close(2**-0.5)
    *released, abstained = token_advantages(stage("exprl-process", routes=routes, variant="code"), [code])[0]
    assert [row.tolist() for row in released] == [[0, 0, 0], [0, 0, 1.0], [0, 0, 0.5]]
    assert abstained is None


def test_a_trace_without_judged_segments_cannot_have_process_rewards():
    with pytest.raises(ValueError, match="sample 0 of problem p has no judged segments"):
        sequences_of(stage("exprl-process"), [group(1.0)])


def test_tokens_of_older_weights_are_distinguished_from_those_of_the_weights_that_learn():
    members = (graded(0, 1.0), replace(graded(1, 0.0), trace=replace(graded(1, 0.0).trace, weight_versions=SPANS)))
    groups = [Group("p", members)]
    (sequences,) = update_samples(stage("sparse-rl"), groups, "v2")
    assert [sequence.on_policy_mask.tolist() for sequence in sequences] == [[False] * 3, [False, True, True]]
    assert [sequence.on_policy_mask for sequence in sequences_of(stage("sparse-rl"), groups)] == [None, None]


def test_every_sample_has_what_the_server_reported_and_no_mask_where_all_tokens_are_of_the_newest_weights():
    first, second = sequences_of(stage("sparse-rl"), [group(1.0, 0.0, tokens=4)])
    for sample in (first, second):
        assert (sample.prompt_ids.tolist(), sample.response_ids.tolist()) == ([1], [10, 11, 12, 13])
        assert sample.rollout_log_probs.tolist() == [-0.5] * 4
        assert sample.on_policy_mask is None and sample.old_log_probs is None and sample.ref_log_probs is None


def test_groups_of_several_routes_keep_their_places():
    """Groups of two estimators alternate; each has the advantages that it has alone."""
    routed = stage("exprl-process", routes={"science": {"granularity": "trace", "estimator": "outcome"}})
    groups = [
        Group("p", (cut(0, (0.0, 1), (1.0, 2)), cut(1, (0.5, 2), (0.25, 1)))),
        group(1.0, 0.0, domain="science"),
        Group("p", (cut(0, (0.75, 1), (0.0, 2)), cut(1, (0.0, 2), (0.5, 1)))),
        group(0.0, 0.5, domain="science"),
    ]
    together = [[row.tolist() for row in rows] for rows in token_advantages(routed, groups)]
    assert together == [[row.tolist() for row in token_advantages(routed, [one])[0]] for one in groups]
    assert len({str(rows) for rows in together}) == 4, "the groups can be distinguished"
