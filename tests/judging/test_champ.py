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
    assert sum(trace.mark is None for trace in champ) == 96
    assert sum(trace.before("prefix") is None for trace in champ) == 43
    assert load_champ(7) == champ[:7]


def test_a_mark_lies_where_its_annotator_put_it(champ):
    trace = next(t for t in champ if t.problem.id == "P_Inequality_21" and t.author == "GPT-4|No C w/o H")
    assert trace.problem.text.startswith("For positive real number a, b and positive integer n, what is the largest")
    assert trace.problem.answer == "1/(n+1)"
    assert trace.problem.reference.for_judge().splitlines()[2] == "So (a*b^n)^(1/(n+1))/(a+bn)≤1/(n+1)."
    step = "Let's rewrite the expression as follows:\n\n(a*b^n)^(1/(n+1)) / (a+bn) = (a^(1/(n+1)) * b) / (a+bn)"
    assert trace.after("segment") == step
    assert trace.after("prefix") == trace.before("prefix") + step
    assert trace.before("segment").startswith("The AM-GM inequality states that")
    assert trace.before("segment").endswith("the geometric mean of the numbers.")


def test_nothing_of_a_mark_is_in_what_stands_before_it(champ):
    for trace in champ:
        if trace.mark is None:
            assert trace.before("prefix") == trace.text
            assert trace.after("prefix") is trace.after("segment") is None
        else:
            assert trace.text[trace.mark[0] :].startswith(trace.after("segment"))
            before = trace.before("segment")
            assert before is None or before in trace.text[: trace.mark[0]]


def test_the_step_before_is_as_long_as_the_marked_one_and_whole():
    text = "We sum. This is one sentence: long.\nSo x = 3.\nThen x = 4."
    start = text.index("Then")
    trace = MarkedTrace(PROBLEM, "GPT-4|0-Shot", text, (start, len(text)))
    assert trace.before("segment") == "long.\nSo x = 3."
    assert MarkedTrace(PROBLEM, "", text, (start, start + 4)).before("segment") == "So x = 3."
    assert MarkedTrace(PROBLEM, "", text, None).before("segment") == text
    assert MarkedTrace(PROBLEM, "", text, (0, 7)).before("segment") is None
