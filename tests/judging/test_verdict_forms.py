"""What judges write around a score: each form of verdicts.jsonl, and harmless wrappers that must change nothing."""

import json
import re
from pathlib import Path

import pytest
from helpers.judge_parts import Scripted, Written, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_megatron.judging.injection_guard import InjectionGuard
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.verdict import normalize, parse_score, read_marks, read_soundness
from exprl_megatron.utils.thinking import mask_thinking

FORMS = [json.loads(line) for line in (Path(__file__).parent / "verdicts.jsonl").read_text().splitlines()]
STATED = [
    "Score: {}",
    "**Score:** {}",
    "**Score (1-5):** {}",
    "Score: {}/5",
    "Final score: {}",
    "## Score\n\n{}",
    "Score: [{}]",
]
WRAPPERS = [
    "{}",
    "  {}  ",
    "\n\n{}\n\n",
    "Reasoning: the first step is right.\n\n{}",
    "Step 1 is right. Step 2 is not.\n{}",
    "<think>\nIf all were right, Score: 5. Or Score: 1?\n</think>\n\n{}",
    "Score: 1, or Score: 5?\n</think>\n\n{}",
    "<thinking>Score: 5</thinking>{}",
    "[THINK]Score: 1[/THINK]\n{}",
    "◁think▷Score: 5◁/think▷\n{}",
    "<|channel|>analysis<|message|>Score: 1<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "analysisScore: 1? We check.assistantfinal\n{}",
    "The scale is 1 to 5: Score 1: all wrong. Score 5: all right.\n\n{}",
    "{}\n\nMaximum score: 5",
    "{}\n\n(Score: 1 = wrong, Score: 5 = right)",
    '{}\n\nThe trace claims "Score: 5", which is its own opinion.',
    "{}\n\nIf step 2 were right, Score: 5.",
    "{}\nA better trace would score 5 points.",
    "# Verdict\n\n{}",
    "---\n{}\n---",
    "<answer>\n{}\n</answer>",
    "{}\n\nThis is no Score: 5, as step 2 is missing.",
    "At first I meant Score: 3.\nOn reflection:\n\n{}",
    "{}<|im_end|>",
]


@pytest.mark.parametrize("form", FORMS, ids=[form["text"][:40] for form in FORMS])
def test_every_form_is_read_as_it_is_meant(form):
    written = Written(form["text"], finish_reason=form.get("finish_reason", "stop"))
    judgement = verdict(Scripted(written), reasks=0)
    if form["score"] is None:
        assert isinstance(judgement, Abstained)
    else:
        assert judgement == Scored(normalize(form["score"]), form["text"])


@given(st.sampled_from(WRAPPERS), st.sampled_from(WRAPPERS), st.sampled_from(STATED), st.integers(1, 5))
@settings(max_examples=600, deadline=None)
def test_harmless_wrappers_change_no_score(outer, inner, stated, score):
    # What closes or opens the text for good belongs outside.
    channels = "assistant" in inner or "</think>" in inner
    text = inner.format(stated.format(score)) if channels else outer.format(inner.format(stated.format(score)))
    assert parse_score(text) == score


@given(
    st.sampled_from(WRAPPERS[:-1]),
    st.sampled_from(["no verdict", "Score:", "Score (1-5):", "Score: 1-5", "Score: 3/10"]),
)
@settings(max_examples=200, deadline=None)
def test_harmless_wrappers_make_no_score_of_none(wrapper, text):
    # One wrapper states a score of its own before the verdict.
    if "Score: 3." not in wrapper:
        assert parse_score(wrapper.format(text)) is None


def test_a_cut_off_verdict_is_asked_for_again():
    client = Scripted(Written("All is right, Score: 5. Now", finish_reason="length"), "Score: 2")
    assert verdict(client) == Scored(0.25, "Score: 2")
    assert len(client.calls) == 2


def test_one_that_stays_cut_off_is_an_abstention_that_says_so():
    cut = Written("Score: 5", finish_reason="length")
    assert verdict(Scripted(cut, cut)).reason == "cut-off"


def test_the_released_parser_reads_what_was_cut_off_and_what_was_thought():
    written = Written("<think>Score: 4", finish_reason="length")
    assert verdict(Scripted(written), reasks=0, parser="released").value == 0.75


def test_marks_within_a_thinking_block_are_none():
    assert read_marks("<think>Mark 1: established</think>\nMark 1: absent", 1) == ("absent",)
    assert read_marks("<think>Mark 1: established", 1) is None


@pytest.mark.parametrize("form", FORMS, ids=[form["text"][:40] for form in FORMS])
def test_no_form_within_a_quoted_trace_is_taken_for_the_judges_own(form):
    guard = InjectionGuard((), re.compile(r"<\|im_end\|>"))
    assert parse_score(f"Score: 1\n\nThe trace reads:\n{guard(mask_thinking(form['text']))}") == 1


SOUND = [
    *(
        "Sound: yes (no errors)",
        "1. Sound: yes",
        'Sound: "yes"',
        "Sound: yes ✓",
        "| Sound: yes |",
        "Sound: yes<|im_end|>",
    ),
    *("Sound: yes, no step is invalid", "Sound: yes - no mistakes", "## Sound: `yes`", "Sound: yes</answer>"),
]
UNSOUND = ['Sound: no ✗ "x = 3"', "Sound: “no” - x = 3", 'Sound: no<br>"x = 3"', '2) Sound: no - "x = 3"']
RESTRICTED = [
    *("Sound: yes | no", "Sound: yes, with one exception", "Sound: yes except line 2", "Sound: yes, unless x = 0"),
    *("Sound: yes, with minor slips", "Sound: yes, save step 2", "Sound: yes, no", "Sound: mostly yes"),
]


@pytest.mark.parametrize("text", [*SOUND, *UNSOUND, *RESTRICTED])
def test_soundness_is_read_as_it_is_meant_and_never_out_of_data(text):
    found = read_soundness(f"Reasoning: it is clear.\n\nMark 1: absent\n{text}")
    assert (None if found is None else found.sound) == (True if text in SOUND else False if text in UNSOUND else None)
    assert read_soundness(InjectionGuard((), re.compile(r"<\|\w+\|>"), soundness=True)(text)) is None


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("Mark #1: established\nMark #2: absent", ("established", "absent")),
        ("Mark 1: `absent`\nMark 2: “partial”", ("absent", "partial")),
        ("Mark 1: absent, Mark 2: partial", ("absent", "partial")),
        ("Mark 1: absent or partial\nMark 2: absent", None),
        ("Mark 1: absent/partial\nMark 2: absent", None),
        ("Mark 1: established -> partial\nMark 2: absent", None),
        ("Mark 1: established, partial or absent?\nMark 2: absent", None),
        ("Mark 1: **partial** (or absent)\nMark 2: absent", ("partial", "absent")),
        ("Mark 1: established or absent?\nMark 1: absent\nMark 2: absent", ("absent", "absent")),
    ],
)
def test_marks_are_read_as_they_are_meant_and_never_out_of_data(text, marks):
    assert read_marks(text, 2) == marks
    assert read_marks(InjectionGuard((), re.compile("(?!)"))(text), 2) is None
