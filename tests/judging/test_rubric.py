"""Rubrics: what is accepted, and the score that follows from marks."""

import json
from fractions import Fraction
from itertools import product

import jsonschema
import pytest

from exprl_megatron.judging.rubric import Checkpoint, Rubric, RubricError, is_quoted, parse_rubric, rubric_schema

REFERENCE = "First take 12.\nThen add 34,  which gives\n$x = 46$. So the answer is 46."
GOOD = [
    {"text": "12 is taken first", "weight": 1, "quote": "take 12"},
    {"text": "The sum is 46", "weight": 3, "quote": "add 34, which gives $x = 46$"},
]


def _json(checkpoints):
    return json.dumps({"checkpoints": checkpoints})


def _with(**change):
    return _json([GOOD[0], GOOD[1] | change])


def test_a_rubric_is_read_out_of_the_builders_words():
    rubric = parse_rubric(f"Here {{it}} is: {{}}\n```json\n{_json(GOOD)}\n```", REFERENCE)
    assert rubric.checkpoints[1] == Checkpoint("The sum is 46", 3.0, "add 34, which gives $x = 46$")
    assert rubric.text == "1. 12 is taken first\n2. The sum is 46"
    assert parse_rubric(rubric.to_json(), REFERENCE) == rubric


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I cannot.", "no JSON object"),
        ('{"points": []}', "no JSON object"),
        (_json(GOOD)[:-3], "no JSON object"),
        (_json([]), "checkpoints"),
        (_json(GOOD[:1]), "checkpoints"),
        (_json([GOOD[0] | {"text": f"claim {i}"} for i in range(7)]), "checkpoints"),
        (_json(["12", "46"]), "checkpoints.0"),
        (_json([GOOD[0], {"text": "The sum is 46", "weight": 1}]), "quote"),
        (_with(weight=0), "weight"),
        (_with(weight=-1), "weight"),
        (_with(weight=1e308), "weight"),
        (_with(weight=float("nan")), "weight"),
        (_with(weight=float("inf")), "weight"),
        (_with(text=""), "text"),
        (_with(text=" \n"), "is empty"),
        (_with(text="12 is  TAKEN first"), "are equal"),
        (_with(note="extra"), "note"),
        (_with(quote="add 35"), "quote of checkpoint 2"),
        (_with(quote="the sum is forty-six"), "quote of checkpoint 2"),
    ],
)
def test_a_rubric_that_fails_a_check_says_which(text, why):
    with pytest.raises(RubricError, match=why):
        parse_rubric(text, REFERENCE)


@pytest.mark.parametrize(
    ("quote", "is_there"),
    [
        ("Then add 34, which gives $x = 46$", True),
        ("then add 34", False),
        ("= 46$.", True),
        ("4", False),
        ("nswer", False),
        ("$", False),
        ("", False),
    ],
)
def test_a_quote_supports_a_checkpoint_where_it_is_in_the_reference_word_for_word(quote, is_there):
    assert is_quoted(quote, REFERENCE) is is_there


RUBRIC = Rubric(tuple(Checkpoint(f"claim {w}", w, "46") for w in (1, 2, 5)))


@pytest.mark.parametrize(
    ("marks", "score"),
    [
        (("established", "established", "established"), 1),
        (("absent", "absent", "absent"), 0),
        (("established", "absent", "absent"), 1 / 8),
        (("established", "partial", "absent"), 2 / 8),
        (("absent", "established", "partial"), 4.5 / 8),
        (("contradicted", "absent", "established"), 4 / 8),
        (("established", "established", "contradicted"), 0),
        (("contradicted", "contradicted", "contradicted"), 0),
    ],
)
def test_the_score_of_a_trace_is_the_weighted_mean_of_its_marks_and_never_negative(marks, score):
    assert RUBRIC.score(marks) == RUBRIC.score(marks, "prefix") == pytest.approx(score)


def test_a_prefix_loses_where_it_goes_wrong():
    marks = [("established", m, "absent") for m in ("absent", "established")]
    before, after = (RUBRIC.score(m, "prefix") for m in marks)
    wrong = RUBRIC.score(("established", "established", "contradicted"), "prefix")
    assert before < after
    assert wrong < before


@pytest.mark.parametrize(
    ("marks", "score"),
    [
        (("established", "absent", "absent"), 1),
        (("absent", "partial", "absent"), 0.5),
        (("absent", "absent", "absent"), 0),
        (("established", "absent", "contradicted"), 0),
    ],
)
def test_a_segment_alone_is_worth_its_best_mark_unless_it_contradicts(marks, score):
    assert RUBRIC.score(marks, "segment") == score


def _combinations(marked=3):
    return list(product(("established", "partial", "absent", "contradicted"), repeat=marked))


@pytest.mark.parametrize("granularity", ["trace", "prefix", "segment"])
def test_soundness_enters_the_score_by_the_documented_formula(granularity):
    """All 64 combinations of marks, sound and not, against docs/judging.md's table written out in fractions."""
    values = {"established": 2, "partial": 1, "absent": 0, "contradicted": -2}
    for marks in _combinations():
        points = [values[mark] for mark in marks]
        if granularity == "segment":
            p = Fraction(0 if -2 in points else max(points), 2)
        else:
            p = max(Fraction(0), Fraction(sum(w * v for w, v in zip((1, 2, 5), points, strict=True)), 16))
        floor = 0 if granularity == "trace" else Fraction(3, 10)
        sound = floor + (1 - floor) * p if -2 not in points else Fraction(3, 10) * p
        assert RUBRIC.score(marks, granularity) == pytest.approx(float(p))
        assert RUBRIC.score(marks, granularity, sound=True) == pytest.approx(float(sound))
        assert RUBRIC.score(marks, granularity, sound=False) == pytest.approx(float(Fraction(3, 10) * p))


@pytest.mark.parametrize("granularity", ["prefix", "segment"])
def test_no_unsound_beginning_scores_above_a_sound_one(granularity):
    sound = [RUBRIC.score(marks, granularity, True) for marks in _combinations() if "contradicted" not in marks]
    unsound = [RUBRIC.score(marks, granularity, False) for marks in _combinations()]
    assert min(sound) > 0 and max(unsound) <= min(sound)


@pytest.mark.parametrize("granularity", ["trace", "prefix", "segment"])
def test_scores_never_fall_where_a_mark_improves_and_stay_within_zero_and_one(granularity):
    order = ("contradicted", "absent", "partial", "established")
    for marks, place, sound in product(_combinations(), range(3), (True, False, None)):
        assert 0 <= RUBRIC.score(marks, granularity, sound) <= 1
        rank = order.index(marks[place])
        if rank < 3:
            better = (*marks[:place], order[rank + 1], *marks[place + 1 :])
            assert RUBRIC.score(better, granularity, sound) >= RUBRIC.score(marks, granularity, sound)


def test_a_whole_trace_that_reaches_nothing_is_worth_nothing_however_sound():
    assert RUBRIC.score(("absent",) * 3, "trace", True) == 0
    assert RUBRIC.score(("established",) * 3, "trace", True) == 1


def test_a_mark_for_every_checkpoint_is_wanted():
    with pytest.raises(ValueError):
        RUBRIC.score(("established", "absent"))


def test_the_schema_is_valid_and_no_wider_than_the_checks():
    schema = json.loads(rubric_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(json.loads(_json(GOOD)))
    for text in (_json(GOOD[:1]), _with(weight=0), _with(text=""), _with(note="extra"), _json([])):
        assert not validator.is_valid(json.loads(text))
