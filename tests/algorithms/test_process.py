"""Process advantages against the numbers of the released code and of the paper's equations."""

import json
from itertools import groupby
from pathlib import Path

import pytest

from exprl_megatron.algorithms.process import SegmentedTrace, process_credits

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "exprl_vectors.json").read_text())
TRACEWISE = [("delta", case) for case in VECTORS["DeltaNorm_delta_process"]["cases"]] + [
    ("end", case) for case in VECTORS["EndNorm_group_process_end"]["cases"]
]
GROUPED = VECTORS["GroupNorm_group_process"]["cases"]
BATCHED = VECTORS["BatchNorm_process_bn"]["cases"]
NAME = lambda value: value if isinstance(value, str) else value["name"]  # noqa: E731


def lengths_of(tokens: list[str]) -> list[int]:
    """Token counts of the released code's segments: the delimiter ends one."""
    lengths = [0]
    for i, token in enumerate(tokens, 1):
        lengths[-1] += 1
        if token.endswith("###") and i < len(tokens):
            lengths.append(0)
    return lengths


def trace(raw: list[int | None], lengths: list[int] | None = None, overlong: bool = False) -> SegmentedTrace:
    scores = tuple(None if score is None else (score - 1) / 4 for score in raw)
    return SegmentedTrace(scores, tuple(lengths or [2] * len(raw)), overlong)


def case_trace(case: dict) -> SegmentedTrace:
    assert lengths_of(case["tokens"]) == [len(list(ids)) for _, ids in groupby(case["segment_ids"])]
    return trace(case["raw"], lengths_of(case["tokens"]), overlong=len(case["tokens"]) == case["max_len"])


def one(scored: SegmentedTrace, estimator: str, *settings, **more):
    return process_credits([[scored]], estimator, *settings, **more)[0][0]


def per_token(credit, scored: SegmentedTrace) -> list[float]:
    pairs = zip(credit.advantages, scored.lengths, strict=True)
    return [advantage for advantage, length in pairs for _ in range(length)]


def close(expected):
    return pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("estimator", "case"), TRACEWISE, ids=NAME)
def test_the_released_codes_tokens_and_masks(estimator, case):
    scored = case_trace(case)
    assert list(scored.scores) == case["scores"]
    credit = one(scored, estimator, "code")
    assert per_token(credit, scored) == close(case["code_token_adv"])
    assert [int(credit.in_loss)] * len(case["tokens"]) == case["code_loss_mask"]


@pytest.mark.parametrize(("estimator", "case"), TRACEWISE, ids=NAME)
def test_the_released_codes_padding_is_what_a_token_of_reward_zero_gets(estimator, case):
    """There is no padding here; an overlong trace has the reward 0 on each token. A missing s_T is not taken off."""
    credit = one(trace([score or 1 for score in case["raw"]], overlong=True), estimator, "code")
    assert list(credit.advantages[:1]) * len(case["code_padding_adv"]) == close(case["code_padding_adv"])


@pytest.mark.parametrize(("estimator", "case"), TRACEWISE, ids=NAME)
def test_the_papers_equations(estimator, case):
    credit = one(trace(case["raw"]), estimator, "paper")
    if case["paper_segment_adv"] is None:
        assert not credit.in_loss
    else:
        assert list(credit.advantages) == close(case["paper_segment_adv"])
        assert credit.in_loss


@pytest.mark.parametrize(("estimator", "case"), TRACEWISE, ids=NAME)
def test_the_recommended_form(estimator, case):
    scored = case_trace(case)
    credit = one(scored, estimator)
    if case["recommended"].get("masked"):
        assert not credit.in_loss
    else:
        assert per_token(credit, scored) == close(case["recommended"]["token_adv"])
        assert credit.in_loss


def case_groups(case: dict) -> list[list[SegmentedTrace]]:
    rows = [trace(raw, lengths_of(tokens)) for raw, tokens in zip(case["raw"], case["tokens"], strict=True)]
    names = case.get("uid", ["all"] * len(rows))
    return [[row for row, of in zip(rows, names, strict=True) if of == name] for name in dict.fromkeys(names)]


@pytest.mark.parametrize(
    ("estimator", "case"), [("group", c) for c in GROUPED] + [("batch", c) for c in BATCHED], ids=NAME
)
def test_the_released_codes_baselines_over_groups_and_batches(estimator, case):
    groups = case_groups(case)
    credits = process_credits(groups, estimator, "code", padded_length=case["padded_len"])
    rows = [pair for both in zip(credits, groups, strict=True) for pair in zip(*both, strict=True)]
    for (credit, scored), expected, mask in zip(rows, case["code_token_adv"], case["code_loss_mask"], strict=True):
        assert per_token(credit, scored) == close(expected)
        assert [int(credit.in_loss)] * len(expected) == mask
    baselines = case["code_group_baseline"].values() if estimator == "group" else [case["batch_baseline"]]
    found = {round(scored.scores[0] - credit.advantages[0], 9) for credit, scored in rows}
    assert sorted(found) == close(sorted(baselines))


@pytest.mark.parametrize("variant", ["paper", "recommended"])
@pytest.mark.parametrize("case", GROUPED, ids=NAME)
def test_group_norm_by_equation_6(case, variant):
    groups = case_groups(case)
    rows = [credit for credits in process_credits(groups, "group", variant) for credit in credits]
    for credit, expected in zip(rows, case["paper_segment_adv"], strict=True):
        assert credit.in_loss is (expected is not None)
        if expected is not None:
            assert list(credit.advantages) == close(expected)
    first = process_credits(groups[:1], "group", variant)[0][0]
    assert groups[0][0].scores[0] - first.advantages[0] == close(case["paper_group_baseline"]["p"])


@pytest.mark.parametrize("variant", ["recommended", "paper"])
def test_batch_norm_takes_the_mean_over_all_valid_traces_of_their_segments_mean(variant):
    groups = [[trace([2, 4]), trace([5])], [trace([1, 3, 5]), trace([3, None])]]
    credits = process_credits(groups, "batch", variant)
    baseline = (0.5 + 1.0 + 0.5) / 3
    assert list(credits[1][0].advantages) == close([0 - baseline, 0.5 - baseline, 1 - baseline])
    assert not credits[1][1].in_loss


@pytest.mark.parametrize("variant", ["recommended", "paper", "code"])
def test_basic_is_the_score_itself(variant):
    assert list(one(trace([2, 5]), "basic", variant).advantages) == close([0.25, 1.0])
    assert list(one(trace([4]), "basic", variant).advantages) == close([0.75])
    assert not one(trace([2, None]), "basic", variant).in_loss


@pytest.mark.parametrize(
    ("estimator", "variant", "expected"),
    [
        ("delta", "recommended", 0.0),
        ("delta", "paper", 0.0),
        ("delta", "code", 0.75),
        ("end", "recommended", 0.0),
        ("end", "paper", 0.75),
        ("end", "code", 0.0),
    ],
)
def test_a_single_segment_earns_nothing_but_in_the_literal_forms(estimator, variant, expected):
    assert one(trace([4]), estimator, variant).advantages == close((expected,))


def test_released_sentinel_escapes_the_mask_where_the_last_score_is_taken_off_it():
    escaped = one(trace([None, 5, 4]), "delta", "code")
    assert escaped.in_loss
    assert list(escaped.advantages) == close([-100.75, 1.0, -0.25])
    assert one(trace([None, 5, 4], overlong=True), "delta", "code").advantages == (0.0, 0.0, 0.0)
    assert not one(trace([None, 5, 1]), "delta", "code").in_loss
    assert not one(trace([None, None, 4]), "delta", "code").in_loss
    assert not one(trace([None, 5, 4]), "end", "code").in_loss
    for variant in ("recommended", "paper"):
        assert not one(trace([None, 5, 4]), "delta", variant).in_loss


def test_overlong_traces_of_the_recommended_form():
    group = [trace([3, 5, 4]), trace([2, 3], overlong=True), trace([5, None])]
    mean_last = (0.75 + 0.5) / 2
    for estimator in ("delta", "end", "group", "batch", "basic"):
        zero, penalized, excluded = (
            process_credits([group], estimator, "recommended", rule)[0] for rule in ("zero", "penalize", "exclude")
        )
        assert (zero[1].advantages, zero[1].in_loss) == ((0.0, 0.0), True)
        assert list(penalized[1].advantages) == close([-mean_last] * 2)
        assert not excluded[1].in_loss
        assert zero[0] == penalized[0] == excluded[0]
    baseline = process_credits([group], "group")[0][0]
    assert list(baseline.advantages) == close([-0.25, 0.25, 0.0])


def test_overlong_traces_of_the_paper_have_the_score_zero():
    group = [trace([3, 5]), trace([2, 3], overlong=True)]
    assert process_credits([group], "delta", "paper")[0][1].advantages == (0.0, 0.0)
    assert process_credits([group], "end", "paper")[0][1].advantages == (0.0, 0.0)
    assert list(process_credits([group], "group", "paper")[0][1].advantages) == close([-0.375, -0.375])


def test_a_group_without_a_valid_trace_is_left_out_whole():
    for estimator in ("delta", "end", "group", "batch", "basic"):
        for rule in ("zero", "penalize", "exclude"):
            credits = process_credits([[trace([None]), trace([2, None])]], estimator, "recommended", rule)
            assert [credit.in_loss for credit in credits[0]] == [False, False]


def test_released_group_norm_wants_to_know_its_padding():
    with pytest.raises(ValueError, match="padded_length"):
        process_credits([[trace([3])]], "group", "code")
