"""Which problems lack what a stage needs, in sentences."""

from exprl_megatron.problems.needs import count_shared, is_verifiable, unmet_needs
from exprl_megatron.problems.problem import CodeTest, Problem, Reference

WITH_ALL = Problem("all", "p", Reference("r"), "1")
LETTER = Problem("letter", "p", Reference("r"), "A", "multiple-choice", ("x", "y"))
RUNS = Problem("runs", "p", Reference("r"), None, "code", tests=(CodeTest("1", "2"),))
JUDGED = [
    Problem("essay", "p", Reference("r"), None, "science"),
    Problem("program", "p", Reference("r"), None, "code"),
    Problem("proof", "p", Reference("r")),
]


def test_nothing_is_missing_where_all_have_it():
    assert unmet_needs([WITH_ALL, LETTER, RUNS, *JUDGED], "reference") == []
    assert unmet_needs([WITH_ALL, LETTER, RUNS], "verification") == []
    assert all(map(is_verifiable, (WITH_ALL, LETTER, RUNS)))


def test_missing_references_are_one_sentence():
    bare = [Problem(f"p{i}", "p", answer="1") for i in range(5)]
    assert unmet_needs([WITH_ALL, *bare], "reference") == [
        "5 of 6 problems have no reference (p0, p1, p2, ...); fix them or leave them out."
    ]


def test_what_cannot_be_verified_is_one_sentence_for_each_domain():
    assert unmet_needs([WITH_ALL, RUNS, *JUDGED], "verification") == [
        "1 of 2 math problems have no answer to compare with (proof); fix them or leave them out.",
        "1 of 2 code problems have no tests to run (program); fix them or leave them out.",
        "1 of 1 science problems have no verifier, only a judge can grade them (essay); fix them or leave them out.",
    ]
    assert not any(map(is_verifiable, JUDGED))


def test_held_out_problems_are_shared_by_their_text_whatever_their_ids_and_white_space():
    training = [Problem("a", "What is 1 + 1?"), Problem("b", "What is 2 + 2?")]
    held_out = [Problem("c", "What is  1 + 1?\n"), Problem("a", "What is 3 + 3?")]
    assert count_shared(held_out, training) == 1
    assert count_shared(training, training) == 2
    assert count_shared([], training) == count_shared(held_out, []) == 0
