"""The released first stage's verifier: answers and verdicts as its own functions gave them."""

import asyncio
from unittest.mock import ANY

import pytest

from exprl_megatron.judging.judgement import Scored
from exprl_megatron.rewards.math_answer import MathVerifier
from exprl_megatron.rewards.prime_answer import extract_prime_answer

# Responses, and what prime_math's match_answer (violetxi/ExpRL, dde1f7c) returned for them.
EXTRACTED = [
    ("The final answer is 7.", "7."),
    ("Answer: 12\n", "12"),
    ("So x is 5. Therefore the final answer is $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
    ("We get 5 is the answer", "5"),
    ("\\boxed{x = 5}", "5"),
    ("\\boxed{1} and \\boxed{2}", "2"),
    ("\\fbox{3}", "3"),
    ("\\boxed 5", "\\boxed 5"),
    ("no number here", "no number here"),
    ("The answers are 1 and 2. Indeed.", "1 and 2"),
    ("\\boxed{4", "\\boxed{4"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_the_answer_is_what_the_released_function_takes_for_it(text, answer):
    assert extract_prime_answer(text) == answer


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(variant="prime") as verifier:
        yield verifier


# Gold, response, and what prime_math's compute_score returned: lenient where the recommended verifier is not.
VERDICTS = [
    ("7", "The final answer is 7.", 1.0),
    ("7", "It should be 7", 1.0),
    ("7", "\\boxed{8}", 0.0),
    ("50\\%", "\\boxed{0.5}", 1.0),
    ("0.5", "\\boxed{50\\%}", 1.0),
    ("3.1416", "\\boxed{3.14159}", 1.0),
    ("3.15", "\\boxed{3.14159}", 0.0),
    ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
    ("\\frac{1}{2}", "Answer: \\frac12", 1.0),
    ("1,000", "\\boxed{1000}", 1.0),
    ("(2,3)", "\\boxed{(2, 3)}", 1.0),
    ("(2,3)", "\\boxed{(3, 2)}", 0.0),
    ("\\text{even}", "\\boxed{even}", 1.0),
    ("5", "no number here", 0.0),
    ("5", "", 0.0),
]


@pytest.mark.parametrize(("gold", "text", "value"), VERDICTS)
def test_the_verdict_is_the_released_one(verifier, gold, text, value):
    assert asyncio.run(verifier.verify(gold, text)).value == value


def test_what_cannot_be_compared_is_0_and_no_abstention(verifier):
    assert asyncio.run(verifier.verify("\\frac{", "\\boxed{)}")) == Scored(0.0, ANY)
