"""The teacher sees the reference, the student never does, and both are asked about the same tokens."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from exprl_megatron.config.problems import PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.teacher import student_and_teacher, teacher_prompts, teacher_token_ids

CONFIG = PromptConfig(system="Be kind.", user="{problem}\nSolution: {reference}\nAgain: {problem}")
SUM = Problem("sum", "What is 1 plus 1?", Reference("It is 2."), "2")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("qwen3"))


def test_problem_and_reference_are_put_into_the_chat(tokenizer):
    assert tokenizer.decode(teacher_token_ids(tokenizer, CONFIG, SUM)) == (
        "<|start|>system\nBe kind.<|end|>\n"
        "<|start|>user\nWhat is 1 plus 1?\nSolution: It is 2.\nAgain: What is 1 plus 1?<|end|>\n"
        "<|start|>assistant\n"
    )


def test_placeholders_within_the_data_stay_as_they_are(tokenizer):
    problem = Problem("p", "the set {reference} and {problem}", Reference("take {problem} {0} \\1"), "2")
    text = tokenizer.decode(teacher_token_ids(tokenizer, PromptConfig(user="{problem} | {reference}"), problem))
    assert "the set {reference} and {problem} | take {problem} {0} \\1<|end|>" in text


def test_choices_are_shown(tokenizer):
    problem = Problem("c", "Which?", Reference("B"), "B", "multiple-choice", ("one", "two"))
    assert "Which?\nA. one\nB. two\nSolution: B" in tokenizer.decode(teacher_token_ids(tokenizer, CONFIG, problem))


def test_every_problem_has_a_prompt_or_the_run_is_refused(tokenizer):
    prompts = teacher_prompts(tokenizer, CONFIG, [SUM], 1000)
    assert prompts == {"sum": teacher_token_ids(tokenizer, CONFIG, SUM)}
    with pytest.raises(UserError, match=r"1 of 2 problems have no reference \(bare\)"):
        teacher_prompts(tokenizer, CONFIG, [SUM, Problem("bare", "p", answer="1")], 1000)
    with pytest.raises(UserError, match=r"1 of 1 prompts of the teacher have more than the 9 tokens .* \(sum; the"):
        teacher_prompts(tokenizer, CONFIG, [SUM], 9)


def test_student_and_teacher_are_asked_about_the_same_tokens_graded_or_not():
    def trace(problem_id, sample, *token_ids):
        return Trace(problem_id, sample, (1, 2), token_ids, (-0.5,) * len(token_ids), "t", "stop", (("v0", 0, 1),))

    groups = [
        Group(
            "a", (GradedTrace(trace("a", 0, 5, 6), Scored(1.0)), GradedTrace(trace("a", 1, 7), Abstained("timeout")))
        ),
        Group("b", (GradedTrace(trace("b", 0), Scored(0.0)), GradedTrace(trace("b", 1, 8, 9), Scored(0.0)))),
    ]
    students, teachers = student_and_teacher(groups, {"a": (3, 3, 3), "b": (4,)})
    responses = [[sequence.response_ids.tolist() for sequence in part] for part in (students, teachers)]
    assert responses == [[[5, 6], [7], [8, 9]]] * 2
    assert [s.prompt_ids.tolist() for s in students] == [[1, 2]] * 3
    assert [t.prompt_ids.tolist() for t in teachers] == [[3, 3, 3], [3, 3, 3], [4]]
    assert students[0].rollout_log_probs.tolist() == [-0.5, -0.5]


def test_the_experts_that_the_server_chose_are_the_students_alone():
    experts = np.ones((3, 2, 1), np.uint8)
    trace = Trace("a", 0, (1, 2), (5, 6), (-0.5, -0.5), "t", "stop", (("v0", 0, 2),), routed_experts=experts)
    (student,), (teacher,) = student_and_teacher([Group("a", (GradedTrace(trace, Scored(1.0)),))], {"a": (3,)})
    assert np.array_equal(student.routed_experts, experts) and teacher.routed_experts is None


def test_students_name_their_groups_and_traces_in_the_rollout_log():
    trace = Trace("a", 3, (1, 2), (5, 6), (-0.5, -0.5), "t", "stop", (("v0", 0, 2),))
    groups = [Group("a", ()), Group("a", (GradedTrace(trace, Scored(1.0)),))]
    (student,), (teacher,) = student_and_teacher(groups, {"a": (3,)})
    assert student.place == (1, 3) and teacher.place is None
