"""The search of a custom stage's prompts for the references of all problems: what it finds, and how its cost grows."""

import math
from random import Random

import numpy as np
import pytest

from exprl_megatron.config.problems import LeakGuardConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.problems.problem import Problem, Reference

WORDS = 40


def text(seed: int) -> str:
    draw = Random(seed)
    return " ".join(f"w{draw.randrange(10**6)}" for _ in range(WORDS))


def guard(problems: int) -> LeakGuard:
    """Of that many problems, whose references have seeds from 0 on."""
    found = [Problem(str(i), f"Question {i}?", Reference(text(i)), "7") for i in range(problems)]
    return LeakGuard(LeakGuardConfig(ngram_words=8), found)


def test_a_piece_of_any_reference_stops_the_run_and_its_problem_is_named():
    ours = guard(30)
    for other in (0, 17, 29):
        piece = " ".join(text(other).split()[20:28])
        with pytest.raises(RunStopped, match=f"for problem 3 shares a run of 8 words with the reference of .*{other},"):
            ours.check_custom_prompt("3", f"{text(1000)} {piece} {text(1001)}")
        ours.check_custom_prompt("3", f"{text(1000)} {' '.join(piece.split()[:7])} {text(1001)}")


def test_references_that_repeat_each_other_are_found():
    problems = [Problem(i, f"Question {i}?", Reference(text(0)), "7") for i in "abc"]
    ours = LeakGuard(LeakGuardConfig(ngram_words=8), problems)
    ours.check_custom_prompt("a", text(1))
    with pytest.raises(RunStopped, match="problem a shares 33 runs"):
        ours.check_custom_prompt("a", text(0))


class Counted(int):
    """Counts comparisons."""

    compared = 0

    def _counting(name):
        def compare(self, other):
            Counted.compared += 1
            return getattr(int, name)(int(self), int(other))

        return compare

    __lt__, __le__, __gt__, __ge__, __eq__ = map(_counting, ("__lt__", "__le__", "__gt__", "__ge__", "__eq__"))
    __hash__ = int.__hash__


def comparisons(ngrams: int, prompt: str) -> int:
    """With n-grams of references, for a prompt of one of the problems."""
    ours = guard(2)
    ours._all_hidden()
    # The hashes of real n-grams are spread like these.
    drawn = np.sort(np.random.default_rng(1).integers(0, 2**64, ngrams, np.uint64)).tolist()
    ours._of_all = {8: np.array([Counted(value) for value in drawn], object)}
    Counted.compared = 0
    ours.check_custom_prompt("0", prompt)
    return Counted.compared


def test_the_comparisons_for_a_prompt_grow_with_the_logarithm_of_the_n_grams_of_all_references():
    prompt = text(1000)
    own = WORDS - 8 + 1
    few, many = comparisons(2**8, prompt), comparisons(2**16, prompt)
    # numpy may compare objects twice in each step of a search; then each n-gram is compared with that at its place.
    assert own <= few <= own * (2 * math.log2(2**8) + 4)
    assert own <= many <= own * (2 * math.log2(2**16) + 4)


def test_the_n_grams_of_all_references_take_eight_bytes_each_and_are_built_once():
    ours = guard(50)
    (ngrams,) = ours._all_hidden().values()
    assert ngrams.nbytes == 8 * 50 * (WORDS - 8 + 1)
    assert ours._hidden == {} and ours._all_hidden()[8] is ngrams
