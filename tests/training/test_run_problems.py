"""The problems of a run are found by their ids, however many there are."""

from types import SimpleNamespace

import pytest
from helpers.operations import instructions

from exprl_megatron.config.stages import SparseRlStage
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptedProblems
from exprl_megatron.training.run_problems import RunProblems

STAGE = SparseRlStage(kind="sparse-rl", name="s", steps=1, problems={"source": "p"}, problems_per_step=1)


def run_problems(count):
    of_run = RunProblems(SimpleNamespace(directory="nowhere", seed=0), None, None)
    problems = tuple(Problem(f"p{i}", f"question {i}") for i in range(count))
    of_run.prompted = {STAGE.problems: PromptedProblems(problems, ((1,),) * count, 0)}
    return of_run


def test_a_problem_and_its_text_are_found_by_the_id():
    of_run = run_problems(5)
    assert of_run.problem(STAGE, "p3") == Problem("p3", "question 3")
    text = of_run.texts(STAGE)
    assert [text("p0"), text("p4"), text("p5")] == ["question 0", "question 4", ""]
    assert of_run.index_of(STAGE) == {"p0": 0, "p1": 1, "p2": 2, "p3": 3, "p4": 4}


@pytest.mark.parametrize("find", [
    lambda of_run, problem_id: of_run.problem(STAGE, problem_id),
    lambda of_run, problem_id: of_run.texts(STAGE)(problem_id),
    lambda of_run, problem_id: of_run.index_of(STAGE)[problem_id],
])  # fmt: skip
def test_the_cost_of_finding_a_problem_does_not_grow_with_the_number_of_problems(find):
    counted = []
    for count in (10, 1000):
        of_run, last = run_problems(count), f"p{count - 1}"
        find(of_run, last)
        counted.append(instructions(lambda of_run=of_run, last=last: find(of_run, last)))
    assert counted[0] == counted[1]
