"""A reference cannot become text by accident."""

import dataclasses
import json
import pickle

import pytest

from exprl_megatron.problems.problem import Problem, Reference

SECRET = "the worked solution"
PROBLEM = Problem("p1", "What is 1 + 1?", Reference(SECRET), "2")


@pytest.mark.parametrize(
    "turn_to_text",
    [
        str,
        lambda r: f"{r}",
        lambda r: f"{r:>10}",
        lambda r: "{}".format(r),  # noqa: UP032
        lambda r: "%s" % r,  # noqa: UP031
        lambda r: "text: " + r,
        lambda r: "".join([r]),
        json.dumps,
        lambda r: json.dumps(r, default=str),
        lambda r: json.dumps(r, default=vars),
        lambda r: json.dumps(dataclasses.asdict(PROBLEM)),
    ],
)
def test_a_reference_refuses_to_become_text(turn_to_text):
    with pytest.raises(TypeError):
        turn_to_text(PROBLEM.reference)


@pytest.mark.parametrize("show", [repr, lambda r: f"{r!r}", lambda r: "%r" % r, ascii])  # noqa: UP031
def test_its_repr_hides_it_alone_and_within_a_problem(show):
    assert SECRET not in show(PROBLEM.reference)
    assert SECRET not in show(PROBLEM)
    assert SECRET not in str(PROBLEM)
    assert SECRET not in str(dataclasses.asdict(PROBLEM))


def test_the_judging_side_reads_it_and_processes_can_pass_it_on():
    assert PROBLEM.reference.for_judge() == SECRET
    assert pickle.loads(pickle.dumps(PROBLEM)) == PROBLEM
