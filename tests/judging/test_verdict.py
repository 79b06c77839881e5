"""Scores as the recommended form of ExpRL reads them: the last one stated, 1..5 only."""

import pytest

from exprl_megatron.judging.judge import read_verdict
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.verdict import normalise, parse_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Reasoning: fine.\nScore: 4", 4),
        ("**Score:** 3", 3),
        ("Score: 4/5", 4),
        ("Score:\n\n2", 2),
        ("Final score: 5", 5),
        ("Score: 1 because\nScore: 5", 5),
        ("Score: 0", None),
        ("no verdict", None),
        ("Score: 4.5", 4),
        ("Score: [4]", 4),
        ("Score: (3)", 3),
        ("Score: **2**", 2),
        ("**Score**: 2", 2),
        ("score 3", 3),
        ("SCORE:1", 1),
        ("Score: 7", None),
        ("Score: 45", None),
        ("Score: -1", None),
        ("Score: 5.5", None),
        ("Score: 4/10", None),
        ("Score: 2, later\nScore: 9", None),
        ("It earns a high score\n\n1. The first step", None),
        ("underscore: 4", None),
        ("Score: ٤", None),
        ("ſcore: 4", None),
        ("Score:", None),
        ("", None),
    ],
)
def test_parse_score(text, score):
    assert parse_score(text) == score


def test_scores_are_spread_evenly_over_zero_to_one():
    assert [normalise(n) for n in range(1, 6)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_verdict_keeps_the_judges_words_and_tells_unreadable_from_out_of_range():
    assert read_verdict("Reasoning: ok\n\nScore: 4") == Scored(0.75, "Reasoning: ok\n\nScore: 4")
    assert read_verdict("Score: 7") == Abstained("out-of-range", "Score: 7")
    assert read_verdict("hm") == Abstained("unreadable", "hm")
