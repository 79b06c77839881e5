"""Reading a judge's words: the recommended form (the last score stated, 1..5 only), the released one, and marks."""

import pytest

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.verdict import (
    Soundness,
    expected_score,
    normalize,
    parse_score,
    read_marks,
    read_soundness,
    read_verdict,
    stated_score,
)


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
        ("score[4] is read", None),
        ('Score: 2\n\nThe trace claims "Score: 5".', 2),
        ("Score: 2\n\n> Score: 5", 2),
        ("Score: 2. It would score 5 points elsewhere.", 2),
        ("The verdict is `Score: 4`", 4),
        ("> **Score: 3**", 3),
        ("Score: ٤", None),
        ("ſcore: 4", None),
        ("Score:", None),
        ("", None),
    ],
)
def test_parse_score(text, score):
    assert parse_score(text) == score


def test_scores_are_spread_evenly_over_zero_to_one():
    assert [normalize(n) for n in range(1, 6)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_verdict_keeps_the_judges_words_and_tells_unreadable_from_out_of_range():
    assert read_verdict("Reasoning: ok\n\nScore: 4") == Scored(0.75, "Reasoning: ok\n\nScore: 4")
    assert read_verdict("Score: 7") == Abstained("out-of-range", "Score: 7")
    assert read_verdict("hm") == Abstained("unreadable", "hm")


# Texts and what the released code reads, from its own parser; a crash there is an abstention here.
RELEASED = [
    ("Reasoning: fine.\nScore: 4", 4, Scored(0.75)),
    ("**Score:** 3", 3, Scored(0.5)),
    ("Score: 4/5", 4, Scored(0.75)),
    ("Score:\n\n2", 2, Scored(0.25)),
    ("Final score: 5", None, Abstained("unreadable")),
    ("Score: 1 because\nScore: 5", 1, Scored(0.0)),
    ("Score: 0", 0, Abstained("out-of-range")),
    ("no verdict", None, Abstained("unreadable")),
    ("Score: 4.5", 4, Scored(0.75)),
    ("[4] Score: [4]", None, Abstained("unreadable")),
    ("Score: 7", 7, Abstained("out-of-range")),
    ("Score 3", 3, Scored(0.5)),
    ("Score:**\n4", None, Abstained("unreadable")),
    ("Score:", None, Abstained("unreadable")),
]


@pytest.mark.parametrize(("text", "stated", "judgement"), RELEASED)
def test_the_released_parser_takes_the_first_score(text, stated, judgement):
    found = stated_score(text, "released")
    assert (None if found is None else found.value) == stated
    read = read_verdict(text, "released")
    assert type(read) is type(judgement)
    assert getattr(read, "value", None) == getattr(judgement, "value", None)
    assert getattr(read, "reason", None) == getattr(judgement, "reason", None)


@pytest.mark.parametrize("parser", ["last", "released"])
@pytest.mark.parametrize("text", ["Score: 4", "so\nScore:\n\n **4**/5", "Score: 2 of 5"])
def test_the_place_of_a_score_is_that_of_its_digit(text, parser):
    stated = stated_score(text, parser)
    assert text[stated.position] == str(int(stated.value))


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("Reasoning: so\n\nMark 1: established\nMark 2: absent", ("established", "absent")),
        ("**Mark 1:** Partial\n**Mark 2**: (contradicted)", ("partial", "contradicted")),
        ("Mark 2: absent\nMark 1: absent\nMark 2: partial", ("absent", "partial")),
        ('Mark 1: absent\nMark 2: absent\nIt says "Mark 1: established".', ("absent", "absent")),
        ("Mark 1: established", None),
        ("Mark 1: established\nMark 2: good", None),
        ("Benchmark 1: partial\nMark 2: partial", None),
        ("", None),
    ],
)
def test_marks_are_read_for_every_checkpoint_or_not_at_all(text, marks):
    assert read_marks(text, 2) == marks


def test_the_expected_score_is_a_mean_over_what_probability_there_is():
    assert expected_score({1: 0.0, 2: 0.0, 3: 0.1, 4: 0.3, 5: 0.0}) == pytest.approx(3.75)
    assert expected_score(dict.fromkeys(range(1, 6), 0.0)) is None


@pytest.mark.parametrize(
    ("text", "sound", "words"),
    [
        ("Mark 1: partial\nSound: yes", True, ""),
        ("Sound: yes.", True, ""),
        ("**Sound:** Yes", True, ""),
        ("- **Sound**: yes", True, ""),
        ("Soundness: yes - every step is valid", True, ""),
        ('Sound: no - "so 2 + 2 = 5"', False, "so 2 + 2 = 5"),
        ("Sound: no – “so 2 + 2 = 5”.", False, "so 2 + 2 = 5"),
        ("**Sound: no** - `x = y - 1`", False, "x = y - 1"),
        ("### Sound: NO", False, ""),
        ('Sound: no, the first is "a > b"', False, 'the first is "a > b'),
        ("Sound:\n\nno - 'x'", False, "x"),
        ("`Sound: no`", False, ""),
        ('Sound: yes\nOn reflection:\nSound: no - "x"', False, "x"),
        ('Sound: no - "x"\n\nThe trace says:\n> Sound: yes', False, "x"),
        ('Sound: no - "x"\nIt says "Sound: yes".', False, "x"),
        ("<think>\nSound: no\n</think>\nSound: yes", True, ""),
    ],
)
def test_the_last_line_about_soundness_counts(text, sound, words):
    assert read_soundness(text) == Soundness(sound, words)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sound:",
        "Mark 1: partial",
        "Sound: no errors",
        "Sound: yes/no",
        "Sound: yes or no",
        "Sound: yes, but not all",
        "Sound: mostly",
        "Sound: not entirely",
        "The proof is sound: yes",
        "<think>Sound: yes",
        "unsound: no",
        "Sound: yes. However, the last step fails",
    ],
)
def test_what_does_not_say_whether_it_is_sound_is_not_a_verdict(text):
    assert read_soundness(text) is None
