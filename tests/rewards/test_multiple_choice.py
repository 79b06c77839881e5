"""Which choice a trace ends on."""

import pytest

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rewards.multiple_choice import grade_choice

CITIES = ("London", "Berlin", "Paris", "New York")
NUMBERS = (r"$\frac{1}{2}$", "3.2 m", "3.2", "3.2")


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{C}",
        r"\boxed{c}",
        r"\boxed{(C)}",
        r"\boxed{\text{C}}",
        r"\boxed{\textbf{(C)}}",
        r"\boxed{C. Paris}",
        r"\boxed{\text{(C) Paris}}",
        r"\boxed{Paris}",
        r"\boxed{ paris. }",
        r"First \boxed{A}, no: \boxed{C}",
        r"The answer is (A), or rather \boxed{C}.",
        r"\boxed{A} is what one might think. But the answer is (C).",
        "Answer: C",
        "Answer:C",
        "answer: c",
        "ANSWER: (C).",
        "**Answer:** C",
        "**Answer**: **C**",
        "Answer:\n\n(C)",
        "The answer is C.",
        "The answer is (C)",
        "The answer is: C",
        "The answer is **C. Paris**.",
        "The answer is Paris.",
        "The answer is C because A and B are wrong.",
        "The answer is C. It cannot be A.",
        "The correct answer is option C",
        "The correct option is (C) Paris.",
        r"The answer is $\text{C}$",
        "Final Answer: The final answer is (C). I hope it is correct.",
        "The answer is A? No. The answer is C",
        "The answer is (C). The answer is obtained by looking at a map.",
        "So.\n#### C",
    ],
)
def test_the_right_choice_in_all_its_forms(text):
    assert grade_choice("C", CITIES, text) == Scored(1.0, "C")


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        (r"\boxed{A}", "A"),
        (r"The answer is (C), no: \boxed{A}", "A"),
        (r"\boxed{A, C}", "A, C"),
        (r"\boxed{C or D}", "C or D"),
        (r"\boxed{(A) and (C)}", "(A) and (C)"),
        (r"\boxed{AC}", "AC"),
        (r"\boxed{C. Berlin}", "C. Berlin"),
        (r"\boxed{E}", "E"),
        (r"\boxed{Rome}", "no answer"),
        (r"\boxed{}", "no answer"),
        (r"\boxed{C", "no answer"),
        ("Answer: E", "E"),
        ("The answer is A or C.", "A or C"),
        ("The answer is A, B and C", "A, B and C"),
        ("The answer is A city that I know.", "no answer"),
        ("The answer is not (C)", "no answer"),
        ("The capital of France is Paris (C).", "no answer"),
        ("I answered C", "no answer"),
        ("", "no answer"),
    ],
)
def test_wrong_ones_and_none_at_all(text, evidence):
    assert grade_choice("C", CITIES, text) == Scored(0.0, evidence)


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("A", r"\boxed{\frac{1}{2}}", 1.0),
        ("B", r"The answer is 3.2 m.", 1.0),
        ("C", r"\boxed{3.2}", 0.0),
        ("D", r"\boxed{3.2}", 0.0),
        ("D", r"\boxed{D}", 1.0),
    ],
)
def test_a_choice_s_text_counts_where_it_is_that_of_one_choice(answer, text, value):
    assert grade_choice(answer, NUMBERS, text).value == value


def test_choices_within_the_question_leave_every_letter_open():
    assert grade_choice("J", (), r"\boxed{J}") == Scored(1.0, "J")
    assert grade_choice("(j)", (), "Answer: J") == Scored(1.0, "J")


@pytest.mark.parametrize("answer", ["E", "", "Paris", "AB", "3"])
def test_a_right_answer_that_is_not_a_choice_is_an_abstention(answer):
    verdict = grade_choice(answer, CITIES, r"\boxed{A}")
    assert isinstance(verdict, Abstained)
    assert verdict.reason == "verifier-error"


def test_a_trace_that_repeats_itself_is_read_quickly():
    assert grade_choice("A", CITIES, "the answer is " * 20_000) == Scored(0.0, "no answer")
