import itertools
from collections import Counter
from random import Random

import pytest

from exprl_megatron.problems import chains
from exprl_megatron.problems.chains import Chain

CHAIN = Chain(7, (("+", 5), ("*", 3), ("-", 4), ("*", 4)))
REFERENCE = "### s1 7 + 5 = 12 ### s2 12 * 3 = 36 ### s3 36 - 4 = 32 ### s4 32 * 4 = 28 ans 28"


def test_texts_of_a_chain():
    assert chains.problem_text(CHAIN) == "Q 7 s1 + 5 s2 * 3 s3 - 4 s4 * 4 A"
    assert chains.reference_text(CHAIN) == REFERENCE
    assert chains.answer_text(CHAIN) == "28"


@pytest.mark.parametrize(
    "value, sign, operand, expected",
    [(99, "+", 5, 4), (2, "-", 5, 97), (50, "*", 4, 0), (33, "*", 3, 99), (0, "-", 2, 98), (10, "+", 2, 12)],
)
def test_sums_are_modulo_100(value, sign, operand, expected):
    assert chains.apply(value, sign, operand) == expected


def test_a_slip_is_carried_on():
    assert chains.values(CHAIN) == [12, 36, 32, 28]
    assert chains.values(CHAIN, {1: 10}) == [12, 46, 42, 68]


def test_chains_have_the_asked_length_and_follow_the_seed():
    assert [len(chains.chain_problem(Random(0), steps).operations) for steps in (1, 4, 7)] == [1, 4, 7]
    assert chains.chain_problem(Random(5), 6) == chains.chain_problem(Random(5), 6)
    assert chains.chain_problem(Random(5), 6) != chains.chain_problem(Random(6), 6)


STEP_1, STEP_2, STEP_3 = "### s1 7 + 5 = 12", "### s2 12 * 3 = 36", "### s3 36 - 4 = 32"


@pytest.mark.parametrize(
    "trace, leading, score",
    [
        (REFERENCE, 4, 5),
        (f"{STEP_1} {STEP_1} {STEP_2} {STEP_3} ### s4 32 * 4 = 28 ans 28", 4, 5),
        (f"{STEP_1} {STEP_2} {STEP_3} ### s4 32 * 4 = 28", 4, 3),
        (f"{STEP_1} {STEP_2} {STEP_3} ### s4 32 * 4 = 29 ans 29", 3, 3),
        (f"{STEP_1} {STEP_2} {STEP_3}", 3, 3),
        (f"{STEP_1} {STEP_2}", 2, 2),
        (f"{STEP_1} {STEP_2} ans 36", 2, 2),
        (STEP_1, 1, 2),
        (f"{STEP_2} {STEP_3}", 0, 1),
        ("### s1 7 + 5 = 13 ### s2 13 * 3 = 39", 0, 1),
        ("### s1 7 + 5 =", 0, 1),
        ("ans", 0, 1),
        ("", 0, 1),
        (f"{STEP_1} ans 28", 1, 4),
        (f"{STEP_1} ### s2 12 * 3 = 37 {STEP_3} ### s4 32 * 4 = 28 ans 28", 1, 4),
    ],
)
def test_scores_of_traces(trace, leading, score):
    assert chains.leading_steps(trace, REFERENCE) == leading
    assert chains.expected_score(trace, REFERENCE) == score


def test_the_longest_chains_use_all_scores_below_the_answer():
    reference = chains.reference_text(Chain(1, (("+", 2),) * 7))
    steps = ["###" + step for step in reference.partition(" ans")[0].split("###")[1:]]
    scores = [chains.expected_score("".join(steps[:n]), reference) for n in range(8)]
    assert scores == [1, 1, 2, 2, 2, 3, 3, 3]


def test_the_judge_reads_problem_reference_and_trace():
    prompt = chains.judge_prompt("Q 7 s1 + 5 A", "### s1 7 + 5 = 12 ans 12", "### s1 7 + 5 = 12")
    assert prompt == "Q 7 s1 + 5 A REF ### s1 7 + 5 = 12 ans 12 TR ### s1 7 + 5 = 12 JUDGE"
    assert chains.judge_prompt("Q 7 A", "ans 7", "") == "Q 7 A REF ans 7 TR JUDGE"


def test_the_judge_stops_at_the_first_error():
    trace = f"{STEP_1} ### s2 12 * 3 = 40 ### s3 40 - 4 = 36 ans 36"
    assert chains.judge_completion(REFERENCE, trace) == "s1 12 12 ok s2 36 40 bad ans 28 36 bad Score: 2"
    assert (
        chains.judge_completion(REFERENCE, trace, past_errors=True)
        == "s1 12 12 ok s2 36 40 bad s3 32 36 bad s4 28 none ans 28 36 bad Score: 2"
    )


def test_the_judge_compares_answers():
    assert (
        chains.judge_completion("### s1 7 + 5 = 12 ans 12", "### s1 7 + 5 = 12 ans 12")
        == "s1 12 12 ok ans 12 12 ok Score: 5"
    )


def test_the_judge_sees_what_is_missing():
    assert chains.judge_completion(REFERENCE, STEP_1) == "s1 12 12 ok s2 36 none ans 28 none Score: 2"
    assert chains.judge_completion(REFERENCE, "") == "s1 12 none ans 28 none Score: 1"


def lessons(pairs):
    return list(pairs(Random(3), 2000))


@pytest.mark.parametrize("pairs", [chains.base_sft_pairs, chains.judge_sft_pairs])
def test_lessons_follow_the_seed_and_use_known_words(pairs):
    rows = lessons(pairs)
    assert len(rows) == 2000
    assert rows == lessons(pairs)
    assert rows != list(pairs(Random(4), 2000))
    assert {word for row in rows for text in row for word in text.split(" ")} <= set(chains.VOCABULARY)


def test_words_are_distinct():
    assert len(set(chains.VOCABULARY)) == len(chains.VOCABULARY) == 125
    assert chains.VOCABULARY[:3] == ("<pad>", "<eos>", "<unk>")


def test_base_lessons_are_faultless_and_left_early_from_the_middle_on():
    finished = Counter()
    for row, (prompt, completion) in enumerate(lessons(chains.base_sft_pairs)):
        words = prompt.split()
        operations = tuple((sign, int(operand)) for sign, operand in itertools.batched(_without_names(words[2:-1]), 2))
        assert chains.reference_text(Chain(int(words[1]), operations)).startswith(completion)
        if row < 1000 or len(operations) >= 5:
            finished[row < 1000, "ans" in completion.split()] += 1
    assert finished[True, True] == 1000
    assert finished[True, False] == 0
    assert 0 < finished[False, True] < 0.05 * finished[False, False]


def _without_names(words):
    return [word for i, word in enumerate(words) if i % 3]


def test_base_lessons_leave_out_the_excluded():
    texts = {prompt for prompt, _ in lessons(chains.base_sft_pairs)}
    again = {prompt for prompt, _ in chains.base_sft_pairs(Random(3), 2000, texts)}
    assert texts.isdisjoint(again)


def test_judge_lessons_leave_out_the_excluded():
    def texts(pairs):
        return {prompt.partition(" REF")[0] for prompt, _ in pairs}

    seen = texts(chains.judge_sft_pairs(Random(3), 500))
    assert seen.isdisjoint(texts(chains.judge_sft_pairs(Random(3), 500, seen)))


def test_judge_lessons_begin_with_single_steps_and_end_with_long_chains():
    steps = [
        prompt.partition(" REF")[2].partition("TR")[0].count("###") for prompt, _ in lessons(chains.judge_sft_pairs)
    ]
    assert set(steps[:600]) == {1}
    assert set(steps[1000:]) == {4, 5, 6, 7}


def test_every_score_and_as_many_wrong_references_as_right_ones_are_taught():
    rng, scores, shared = Random(1), Counter(), 0
    for _ in range(3000):
        _, reference, trace = chains.judge_case(rng, 6)
        scores[chains.expected_score(trace, reference)] += 1
        # All that the trace says is also in the reference: the same solution, finished or not.
        shared += chains.step_values(trace).items() <= chains.step_values(reference).items()
    assert all(scores[score] > 60 for score in (1, 2, 3, 4, 5))
    assert 0.4 < shared / 3000 < 0.7


def test_a_reference_with_a_slip_is_still_the_measure():
    slipped = "### s1 7 + 5 = 13 ### s2 13 * 3 = 39 ans 39"
    assert chains.expected_score(slipped, slipped) == 5
    assert chains.expected_score("### s1 7 + 5 = 12 ### s2 12 * 3 = 36 ans 36", slipped) == 1
