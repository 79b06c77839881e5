"""The real package: its figures are those of its paper, and a mark cuts a text as people cut it."""

import pytest

from exprl_megatron.judging.champ import MarkedTrace, load_champ
from exprl_megatron.problems.problem import Problem, Reference

PROBLEM = Problem("p", "?", Reference("!"))


@pytest.fixture(scope="module")
def champ():
    return load_champ()


def test_the_package_has_540_marks_on_270_problems(champ):
    assert len(champ) == 540
    assert len({trace.problem.id for trace in champ}) == 270
    assert sum(trace.error_span is None for trace in champ) == 96
    assert sum(trace.text_before_error("prefix") is None for trace in champ) == 43
    assert load_champ(7) == champ[:7]


def test_a_mark_is_where_its_annotator_put_it(champ):
    trace = next(t for t in champ if t.problem.id == "P_Inequality_21" and t.generator == "GPT-4|No C w/o H")
    assert trace.problem.text.startswith("For positive real number a, b and positive integer n, what is the largest")
    assert trace.problem.answer == "1/(n+1)"
    assert trace.problem.reference.for_judge().splitlines()[2] == "So (a*b^n)^(1/(n+1))/(a+bn)≤1/(n+1)."
    step = "Let's rewrite the expression as follows:\n\n(a*b^n)^(1/(n+1)) / (a+bn) = (a^(1/(n+1)) * b) / (a+bn)"
    assert trace.text_with_error("segment") == step
    assert trace.text_with_error("prefix") == trace.text_before_error("prefix") + step
    assert trace.text_before_error("segment").startswith("The AM-GM inequality states that")
    assert trace.text_before_error("segment").endswith("the geometric mean of the numbers.")


def test_nothing_of_a_mark_is_in_the_text_before_it(champ):
    for trace in champ:
        if trace.error_span is None:
            assert trace.text_before_error("prefix") == trace.text
            assert trace.text_with_error("prefix") is trace.text_with_error("segment") is None
        else:
            assert trace.text[trace.error_span[0] :].startswith(trace.text_with_error("segment"))
            before = trace.text_before_error("segment")
            assert before is None or before in trace.text[: trace.error_span[0]]


def test_the_step_before_is_as_long_as_the_marked_one_and_whole():
    text = "We sum. This is one sentence: long.\nSo x = 3.\nThen x = 4."
    start = text.index("Then")
    trace = MarkedTrace(PROBLEM, "GPT-4|0-Shot", text, (start, len(text)))
    assert trace.text_before_error("segment") == "long.\nSo x = 3."
    assert MarkedTrace(PROBLEM, "", text, (start, start + 4)).text_before_error("segment") == "So x = 3."
    assert MarkedTrace(PROBLEM, "", text, None).text_before_error("segment") == text
    assert MarkedTrace(PROBLEM, "", text, (0, 7)).text_before_error("segment") is None
