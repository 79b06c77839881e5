import json

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.judging.labeled_traces import LabeledTrace, read_labeled_traces
from exprl_megatron.problems.problem import Problem, Reference

RIGHT = {"problem_id": "a", "problem": "1 + 1?", "reference": "It is 2.", "answer": "2", "trace": "2", "correct": True}
WRONG = {**RIGHT, "problem_id": "b", "trace": "3", "correct": False}


@pytest.fixture
def written(tmp_path):
    """`written(record, ...)`: a file with these lines."""

    def write(*records: dict | str):
        path = tmp_path / "judged.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def refusal(path, limit=None) -> str:
    with pytest.raises(UserError) as refused:
        read_labeled_traces(path, limit)
    return str(refused.value)


def test_every_field_arrives(written):
    science = {**WRONG, "domain": "multiple-choice", "choices": ["two", "three"], "answer": None}
    assert read_labeled_traces(written(RIGHT, "", science)) == (
        LabeledTrace(Problem("a", "1 + 1?", Reference("It is 2."), "2"), "2", True),
        LabeledTrace(
            Problem("b", "1 + 1?", Reference("It is 2."), None, "multiple-choice", ("two", "three")), "3", False
        ),
    )


def test_the_limit_takes_the_first_lines(written):
    assert len(read_labeled_traces(written(RIGHT, WRONG, RIGHT, "no JSON"), 2)) == 2


def test_every_fault_is_named_with_its_line(written):
    path = written({**RIGHT, "correct": 1}, "[]", {**WRONG, "domain": "maths", "trace": None}, "{", WRONG)
    told = refusal(path).splitlines()
    assert told[0] == f"{path} line 1: the field 'correct' is 1; write true or false."
    assert told[1].startswith(f"{path} line 2: this is a JSON list")
    assert told[2] == f"{path} line 3: the field 'trace' is None, not text; write it as text."
    assert "write one of math, multiple-choice, science, code" in told[3]
    assert told[4].startswith(f"{path} line 4: this is not JSON")
    assert len(told) == 5


def test_one_id_for_two_problems_is_refused(written):
    assert "'a' is another problem further up" in refusal(written(RIGHT, {**WRONG, "problem_id": "a", "problem": "?"}))


def test_traces_that_cannot_calibrate_are_refused(written, tmp_path):
    assert "1 of the 1 selected traces are right" in refusal(written(RIGHT, WRONG), 1)
    assert "0 of the 1 selected traces" in refusal(written(WRONG))
    assert "all traces are of one problem" in refusal(written(RIGHT, {**RIGHT, "correct": False}))
    assert "cannot be read" in refusal(tmp_path / "nowhere.jsonl")


def test_domains_of_the_users_own_are_read_where_the_config_has_them(written):
    path = written({**RIGHT, "domain": "measured"}, WRONG)
    assert "write one of math, multiple-choice, science, code." in refusal(path)
    assert read_labeled_traces(path, domains=("math", "measured"))[0].problem.domain == "measured"
