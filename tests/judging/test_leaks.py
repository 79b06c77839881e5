from random import Random

import chains
import pytest

from exprl_megatron.config.problems import LeakGuardConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.problems.problem import Problem, Reference

CANARY = "EXPRL-CANARY-7f3a"
STATEMENT = "Let a and b be positive integers with a + b = 10. Find the largest possible value of the product ab."
SOLUTION = (
    "Let a and b be positive integers with a + b = 10. Since b = 10 - a, the product equals a(10 - a), a parabola "
    r"that opens downward with its top at a = 5; hence \boxed{25} is the largest value that it takes."
)
PROBLEM = Problem("p", STATEMENT, Reference(SOLUTION), "25")


def guard(*problems: Problem, **config) -> LeakGuard:
    return LeakGuard(LeakGuardConfig(**config), problems or (PROBLEM,))


def chat(text: str, system: str = r"Reason step by step and put the final answer in \boxed{}.") -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_the_statement_in_its_chat_passes_even_where_the_reference_repeats_it():
    guard().check_request("p", chat(STATEMENT))


def test_a_prompt_that_shows_the_reference_stops_the_run():
    with pytest.raises(RunStopped, match=r"problem p shares .* runs of 12 words"):
        guard().check_request("p", chat(f"{STATEMENT}\n\nThis is a solution:\n{SOLUTION}"))


def test_a_piece_of_the_reference_of_the_configured_length_stops_the_run():
    words = SOLUTION.split()
    piece = " ".join(words[24:38])
    with pytest.raises(RunStopped):
        guard().check_request("p", chat(f"{STATEMENT} Hint: {piece}"))
    guard(ngram_words=30).check_request("p", chat(f"{STATEMENT} Hint: {piece}"))


def test_case_blanks_and_punctuation_hide_nothing():
    disguised = "THE PRODUCT,equals:  a [10-A] --\n\na  Parabola that «opens» downward with its top at a＝５"
    with pytest.raises(RunStopped):
        guard().check_request("p", chat(f"{STATEMENT} {disguised}"))


def test_the_same_words_in_another_order_are_not_a_leak():
    backwards = " ".join(reversed(SOLUTION.split()))
    guard().check_request("p", chat(f"{STATEMENT} {backwards}"))


def test_the_message_tells_place_and_size_and_no_word_of_the_reference():
    text = chat(f"{STATEMENT} {SOLUTION}", system="")
    with pytest.raises(RunStopped) as stopped:
        guard().check_request("p", text)
    told = str(stopped.value)
    assert "leak_guard.ngram_words" in told
    assert "parabola" not in told and "25" not in told
    overlap = guard().overlap("p", text)
    assert f"its words {overlap.first_word} to {overlap.last_word}" in told
    assert (overlap.ngram_words, overlap.coverage) == (12, 1.0)


def test_scripts_without_blanks_are_compared_by_character():
    problem = Problem("z", "求最大值。", Reference("因为二次函数开口向下所以在顶点处取得最大值答案是二十五"))
    with pytest.raises(RunStopped):
        guard(problem).check_request("z", chat("求最大值。提示：二次函数开口向下，所以在顶点处取得最大值"))
    guard(problem).check_request("z", chat("求最大值。提示：二次函数"))


def test_a_reference_that_the_statement_holds_has_nothing_to_hide():
    choices = ("Mitochondria produce most of the ATP of a cell", "Ribosomes produce it")
    problem = Problem("mc", "Which is true?", Reference(choices[0]), "A", "multiple-choice", choices)
    guard(problem).check_request("mc", chat(problem.statement))
    assert not guard(problem).is_guarded("mc")


def test_a_choice_with_more_said_about_it_is_looked_for_whole():
    choices = ("Mitochondria produce most ATP", "Ribosomes produce it")
    problem = Problem("mc", "Which is true?", Reference(f"The answer is A. {choices[0]}."), "A", choices=choices)
    guard(problem).check_request("mc", chat(problem.statement))
    with pytest.raises(RunStopped, match="runs of 8 words"):
        guard(problem).check_request("mc", chat(f"{problem.statement} the answer is A: {choices[0]}"))


def test_a_reference_of_a_word_or_two_is_not_looked_for():
    problem = Problem("s", "What is 2 + 2?", Reference("It is 4"))
    assert not guard(problem).is_guarded("s")
    guard(problem).check_request("s", chat("What is 2 + 2? It is 4"))


def test_a_problem_without_a_reference_passes():
    problem = Problem("b", "What is 2 + 2?", None, "4")
    guard(problem).check_request("b", chat(problem.statement))
    assert not guard(problem).is_guarded("b")


def test_the_miniatures_prompts_pass_and_its_hinted_ones_do_not():
    rng = Random(5)
    made = [chains.chain_problem(rng, steps) for steps in (*chains.LONG, 4, 3) for _ in range(200)]
    problems = [
        Problem(str(i), chains.problem_text(c), Reference(chains.reference_text(c))) for i, c in enumerate(made)
    ]
    watching = guard(*problems)
    for problem in problems:
        watching.check_request(problem.id, problem.statement)
        hinted = chains.problem_with_reference_text(problem.statement, problem.reference.for_judge())
        with pytest.raises(RunStopped):
            watching.check_request(problem.id, hinted)


def test_problems_that_share_an_id_are_all_watched():
    other = Problem("p", "How many primes are below 10?", Reference("They are 2, 3, 5 and 7, and so there are four."))
    watching = guard(PROBLEM, other, PROBLEM)
    watching.check_request("p", chat(STATEMENT))
    watching.check_request("p", chat(other.statement))
    for leaked in (SOLUTION, other.reference.for_judge()):
        with pytest.raises(RunStopped):
            watching.check_request("p", chat(f"{STATEMENT} {leaked}"))


def test_the_reference_of_another_problem_is_not_a_leak_of_this_one():
    other = Problem("q", "How many primes are below 10?", Reference("They are 2, 3, 5 and 7, and so there are four."))
    guard(PROBLEM, other).check_request("q", chat(SOLUTION))


def test_an_unknown_problem_is_a_defect_of_the_caller():
    with pytest.raises(KeyError):
        guard().check_request("unknown", chat(STATEMENT))


@pytest.mark.parametrize("text", [CANARY, CANARY.lower(), "EXPRL - CANARY -\n7f3a"])
def test_a_planted_canary_is_found_in_requests_and_traces(text):
    watching = guard(canary=CANARY)
    with pytest.raises(RunStopped, match=r"a request .* problem p contains leak_guard\.canary") as request:
        watching.check_request("p", chat(f"{STATEMENT} {text}"))
    with pytest.raises(RunStopped, match=r"a trace of problem p contains leak_guard\.canary") as trace:
        watching.check_trace("p", f"First, {text}, then")
    assert CANARY not in str(request.value) + str(trace.value)
    watching.check_request("p", chat(STATEMENT))
    watching.check_trace("p", "First a, then b.")


def test_a_short_solution_is_found_with_its_canary_and_without():
    problem = Problem("c", "Q 7 s1 + 5 s2 * 3 A", Reference(f"s2 36 ans 36\n{CANARY}"))
    watching = guard(problem, canary=CANARY)
    watching.check_request("c", problem.statement)
    for leaked in ("s2 36 ans 36", f"s2 36 ans 36\n{CANARY}"):
        with pytest.raises(RunStopped, match="runs of 4 words"):
            watching.check_request("c", f"{problem.statement} REF {leaked} A")


def test_a_trace_may_find_the_reference_by_itself():
    guard(canary=CANARY).check_trace("p", SOLUTION)


def test_without_a_canary_traces_pass():
    guard().check_trace("p", CANARY)


@pytest.mark.parametrize("canary", ["", "   ", "abc d"])
def test_a_canary_that_turns_up_by_chance_is_refused(canary):
    with pytest.raises(UserError, match=r"The canary .* occurs by chance; .* at least 8 characters"):
        guard(canary=canary)
