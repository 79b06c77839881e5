import itertools
from collections import Counter
from random import Random

import chains
import pytest
from chains import Chain

from exprl_megatron.judging.prompt import load_prompt

CHAIN = Chain(7, (("+", 5), ("*", 3), ("-", 4), ("*", 4), ("-", 5)))
REFERENCE = "s2 36 s4 28 ans 23"
STEP_1, STEP_2, STEP_3 = "### s1 7 + 5 = 12", "### s2 12 * 3 = 36", "### s3 36 - 4 = 32"
STEP_4, STEP_5 = "### s4 32 * 4 = 28", "### s5 28 - 5 = 23"
WORKED = f"{STEP_1} {STEP_2} {STEP_3} {STEP_4} {STEP_5} ans 23"


def test_texts_of_a_chain():
    assert chains.problem_text(CHAIN) == "Q 7 s1 + 5 s2 * 3 s3 - 4 s4 * 4 s5 - 5 A"
    assert chains.worked_text(CHAIN) == WORKED
    assert chains.reference_text(CHAIN) == REFERENCE
    assert chains.answer_text(CHAIN) == "23"


def test_short_chains_have_terse_references_too():
    assert chains.reference_text(Chain(7, (("+", 5),))) == "ans 12"
    assert chains.reference_text(Chain(7, (("+", 5), ("*", 3)))) == "s2 36 ans 36"


def test_a_hinted_problem_shows_the_reference_and_asks_again():
    assert chains.problem_with_reference_text("Q 7 s1 + 5 A", "ans 12") == "Q 7 s1 + 5 A REF ans 12 A"


@pytest.mark.parametrize(
    "value, sign, operand, expected",
    [(99, "+", 5, 4), (2, "-", 5, 97), (50, "*", 4, 0), (33, "*", 3, 99), (0, "-", 2, 98), (10, "+", 2, 12)],
)
def test_sums_are_modulo_100(value, sign, operand, expected):
    assert chains.apply(value, sign, operand) == expected


def test_a_slip_is_carried_on():
    assert chains.values(CHAIN) == [12, 36, 32, 28, 23]
    assert chains.values(CHAIN, {1: 10}) == [12, 46, 42, 68, 63]


def test_chains_have_the_asked_length_and_follow_the_seed():
    assert [len(chains.chain_problem(Random(0), steps).operations) for steps in (1, 4, 7)] == [1, 4, 7]
    assert chains.chain_problem(Random(5), 6) == chains.chain_problem(Random(5), 6)
    assert chains.chain_problem(Random(5), 6) != chains.chain_problem(Random(6), 6)


@pytest.mark.parametrize(
    "trace, leading, score",
    [
        (WORKED, 2, 5),
        (f"{STEP_1} {STEP_1} {STEP_2} {STEP_3} {STEP_4} {STEP_5} ans 23", 2, 5),
        (f"{STEP_2} {STEP_4} ans 23", 2, 5),
        (f"{STEP_1} {STEP_2} {STEP_3} {STEP_4} {STEP_5}", 2, 3),
        (f"{STEP_1} {STEP_2} {STEP_3} {STEP_4} ### s5 28 - 5 = 22 ans 22", 2, 3),
        (f"{STEP_1} {STEP_2} {STEP_3} {STEP_4} ###", 2, 3),
        (f"{STEP_1} {STEP_2} {STEP_3}", 1, 2),
        (f"{STEP_1} {STEP_2} ans 36", 1, 2),
        (f"{STEP_2} ###", 1, 2),
        (STEP_1, 0, 1),
        (f"{STEP_3} {STEP_4}", 0, 1),
        ("### s1 7 + 5 = 13 ### s2 13 * 3 = 39", 0, 1),
        ("### s1 7 + 5 = 12 ### s2 12 * 3 =", 0, 1),
        ("ans", 0, 1),
        ("", 0, 1),
        (f"{STEP_1} ans 23", 0, 4),
        (f"{STEP_1} ### s2 12 * 3 = 37 {STEP_3} {STEP_4} ans 23", 0, 4),
    ],
)
def test_scores_of_traces(trace, leading, score):
    assert chains.leading_checkpoints(trace, REFERENCE) == leading
    assert chains.expected_score(trace, REFERENCE) == score


@pytest.mark.parametrize("steps, scores", [(5, [1, 1, 2, 2, 3, 3]), (7, [1, 1, 2, 2, 3, 3, 3, 3])])
def test_unfinished_long_chains_use_all_scores_below_the_answer(steps, scores):
    chain = Chain(1, (("+", 2),) * steps)
    beginnings = [chains.solution_text(chain, chains.values(chain)[:n], None) for n in range(steps + 1)]
    assert [chains.expected_score(text, chains.reference_text(chain)) for text in beginnings] == scores


def test_a_chain_without_checkpoints_is_judged_by_its_answer():
    assert chains.expected_score("### s1 7 + 5 = 12 ans 12", "ans 12") == 5
    assert chains.expected_score("### s1 7 + 5 = 12", "ans 12") == 1


@pytest.mark.parametrize(
    "segment, written",
    [
        (STEP_1, "s1 none Score: 3"),
        (STEP_2, "s2 36 36 ok Score: 5"),
        ("s2 12 * 3 = 36 ###", "s2 36 36 ok Score: 5"),
        ("### s4 32 * 4 = 31", "s4 28 31 bad Score: 1"),
        ("### s4 32 * 4 =", "s4 28 none Score: 1"),
        (f"{STEP_5} ans 23", "ans 23 23 ok Score: 5"),
        ("### s4 32 * 4 = 28 ans 28", "ans 23 28 bad Score: 1"),
        ("###", "none Score: 3"),
        ("", "none Score: 3"),
    ],
)
def test_the_judge_compares_one_segment(segment, written):
    assert chains.step_completion(REFERENCE, segment) == written
    assert str(chains.expected_step_score(segment, REFERENCE)) == written[-1]


def test_the_judge_reads_problem_reference_and_trace():
    prompt = chains.judge_prompt("Q 7 s1 + 5 A", "ans 12", "### s1 7 + 5 = 12")
    assert prompt == "Q 7 s1 + 5 A REF ans 12 TR ### s1 7 + 5 = 12 JUDGE"
    assert chains.judge_prompt("Q 7 A", "ans 7", "") == "Q 7 A REF ans 7 TR JUDGE"
    assert chains.step_prompt("Q 7 A", "ans 7", "### s1") == "Q 7 A REF ans 7 TR ### s1 STEP"


@pytest.mark.parametrize("task, asked", [("miniature", chains.judge_prompt), ("miniature-segment", chains.step_prompt)])
def test_the_shipped_prompts_ask_what_the_judge_has_learnt(task, asked):
    texts = ("Q 7 s1 + 5 A", "ans 12", "### s1 7 + 5 = 12")
    (message,) = load_prompt(task).messages(*texts)
    assert message == {"role": "user", "content": asked(*texts)}


def test_the_judge_stops_at_the_first_error():
    trace = f"{STEP_1} ### s2 12 * 3 = 40 ### s3 40 - 4 = 36 ans 36"
    assert chains.judge_completion(REFERENCE, trace) == "s2 36 40 bad ans 23 36 bad Score: 1"
    assert (
        chains.judge_completion(REFERENCE, trace, past_errors=True) == "s2 36 40 bad s4 28 none ans 23 36 bad Score: 1"
    )


def test_the_judge_compares_answers():
    assert chains.judge_completion(REFERENCE, WORKED) == "s2 36 36 ok s4 28 28 ok ans 23 23 ok Score: 5"


def test_the_judge_sees_what_is_missing():
    assert chains.judge_completion(REFERENCE, f"{STEP_1} {STEP_2}") == "s2 36 36 ok s4 28 none ans 23 none Score: 2"
    assert chains.judge_completion(REFERENCE, "") == "s2 36 none ans 23 none Score: 1"


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
    assert len(set(chains.VOCABULARY)) == len(chains.VOCABULARY) == 126
    assert chains.VOCABULARY[:3] == ("<pad>", "<eos>", "<unk>")


def test_base_lessons_are_faultless_and_left_early_from_the_middle_on():
    written, finished = [], Counter()
    for row, (prompt, completion) in enumerate(lessons(chains.base_sft_pairs)):
        problem, _, hint = prompt.partition(" REF ")
        chain = _parsed(problem)
        assert chains.worked_text(chain).startswith(completion)
        assert hint in ("", f"{chains.reference_text(chain)} A")
        if row < 1000 or len(chain.operations) >= 5:
            finished[row < 1000, bool(hint), "ans" in completion.split()] += 1
        if row >= 1000 and len(chain.operations) >= 2:
            written.append((bool(hint), completion.count("###") > 1))
    assert finished[True, False, True] + finished[True, True, True] == 1000
    assert finished[False, False, True] <= 0.02 * finished[False, False, False]
    assert 0.14 <= _share(went_on for hinted, went_on in written if not hinted) <= 0.26
    assert 0.36 <= _share(went_on for hinted, went_on in written if hinted) <= 0.54
    assert 0.2 <= _share(hinted for hinted, _ in written) <= 0.3


def _parsed(problem):
    words = problem.split()
    return Chain(int(words[1]), tuple((sign, int(operand)) for _, sign, operand in itertools.batched(words[2:-1], 3)))


def _share(hits):
    hits = list(hits)
    return sum(hits) / len(hits)


def test_base_lessons_leave_out_the_excluded():
    def texts(pairs):
        return {prompt.partition(" REF")[0] for prompt, _ in pairs}

    seen = texts(lessons(chains.base_sft_pairs))
    assert seen.isdisjoint(texts(chains.base_sft_pairs(Random(3), 2000, seen)))


def test_judge_lessons_leave_out_the_excluded():
    def texts(pairs):
        return {prompt.partition(" REF")[0] for prompt, _ in pairs}

    seen = texts(chains.judge_sft_pairs(Random(3), 500))
    assert seen.isdisjoint(texts(chains.judge_sft_pairs(Random(3), 500, seen)))


def test_judge_lessons_begin_with_short_chains_and_end_with_long_ones():
    references = [prompt.partition(" REF ")[2].partition(" TR ")[0] for prompt, _ in lessons(chains.judge_sft_pairs)]
    found = [len(chains.checkpoints(reference)) for reference in references]
    assert set(found[:600]) == {0, 1}
    assert set(found[1000:]) == {2, 3}


def test_three_judge_lessons_in_ten_are_about_one_segment():
    last = Counter(prompt.split()[-1] for prompt, _ in lessons(chains.judge_sft_pairs))
    assert last.keys() == {"JUDGE", "STEP"}
    assert 0.25 <= last["STEP"] / 2000 <= 0.35


def test_every_score_and_as_many_wrong_references_as_right_ones_are_taught():
    rng, scores, shared = Random(1), Counter(), []
    for _ in range(3000):
        _, reference, trace = chains.judge_case(rng, 6)
        scores[chains.expected_score(trace, reference)] += 1
        # Whatever of the reference the trace speaks of, it says the same: one solution, finished or not.
        written = chains.step_values(trace) | {"ans": chains.stated_answer(trace)}
        wanted = chains.checkpoints(reference) | {"ans": chains.stated_answer(reference)}
        pairs = [(written[name], wanted[name]) for name in wanted if written.get(name) is not None]
        if pairs:
            shared.append(all(one == other for one, other in pairs))
    assert all(scores[score] > 60 for score in (1, 2, 3, 4, 5))
    assert 0.4 < _share(shared) < 0.7


def test_every_score_of_a_segment_is_taught_as_often():
    rng = Random(1)
    cases = [chains.step_case(rng, 6) for _ in range(3000)]
    scores = Counter(chains.expected_step_score(segment, reference) for _, reference, segment in cases)
    assert all(700 < scores[score] < 1400 for score in (1, 3, 5))


def test_a_reference_with_a_slip_is_still_the_measure():
    slipped = "### s1 7 + 5 = 13 ### s2 13 * 3 = 39 ans 39"
    assert chains.expected_score(slipped, "s2 39 ans 39") == 5
    assert chains.expected_score("### s1 7 + 5 = 12 ### s2 12 * 3 = 36 ans 36", "s2 39 ans 39") == 1
