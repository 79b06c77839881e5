"""Answers that want their verifier to fail: each scores 0, and the verifier works on."""

import asyncio

import pytest

from exprl_megatron.judging.judgement import Scored
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rewards.verifier import AnswerVerifier

DEADLINE_S = 3.0
LONG = 50_000

BOXED = {
    "a tower": "2^{3^{4^{5^{6}}}}",
    "a power of a factorial": "(9!)!^{(9!)!}",
    "a root without end": r"\sqrt{" * 120 + "7" + "}" * 120,
    "nested fractions": r"\frac{1}{" * 150 + "7" + "}" * 150,
    "a factor with many terms": r"(x+y+z+w)^{400}",
    "a product to expand": r"(a+b)^{60}(c+d)^{60}(e+f)^{60}",
    "a large determinant": r"\begin{pmatrix}" + r"\\".join("&".join("abcdefgh") for _ in range(8)) + r"\end{pmatrix}",
    "a huge interval": "[" + ",".join(map(str, range(LONG // 10))) + "]",
    "a set of roots": r"\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(2000)) + r"\}",
    "a limit": r"\lim_{x\to 0}\frac{\sin^{50}(x^{50})}{x^{2500}}",
    "a derivative": r"\frac{d}{dx} x^{x^{x^{x^{x}}}}",
    "an equation of degree 99": "x^{99} - x + 1 = 0",
    "a logarithm of a tower": r"\log_{2}(3^{10^{12}})",
    "a percent of a tower": r"9^{9^{9^{9}}}\%",
    "a number with many digits": "7." + "0" * LONG + "1",
    "a number with many groups": "1" + ",000" * (LONG // 4),
    "an exponent of many digits": "1e" + "9" * 4000,
    "code": r"__import__('os')._exit(0)",
    "an attribute": r"().__class__.__bases__[0].__subclasses__()",
    "many commands": r"\left(" * 2000,
    "many signs": "-" * LONG + "8",
    "many spaces": "8" + " " * LONG + "8",
    "many equal signs": "8=" * (LONG // 2) + "8",
    "right to left marks": "\u202e" * LONG + "8",
    "digits of other scripts": "\u0668" * 400,
    "a combining flood": "8" + "\u0301" * LONG,
    "a base of many digits": "8_{" + "9" * 4000 + "}",
    "a clock": ":".join(["99"] * 4000),
    "many units": r"8\text{ m}" * 4000,
    "a comment": "8%" + "}" * 50,
}
CHOICES = {
    "many letters": "the answer is " * 10_000,
    "many boxes": r"\boxed{A}" * 5000 + r"\boxed{B}",
    "boxes without end": r"\boxed{" * 20_000,
    "a long line": "answer:" + "*" * LONG,
}
TEXTS = {
    "boxes in boxes": r"\boxed{" * 5000 + "8" + "}" * 5000,
    "a box without end": r"\boxed{8" + "{" * LONG,
    "many hashes": "####" * LONG,
    "surrogates": r"\boxed{" + "\ud800" * 500 + "}",
}


@pytest.fixture(scope="module")
def verifier():
    with AnswerVerifier() as verifier:
        yield verifier


def _verdicts(verifier, problem, texts):
    async def all_of_them():
        return await asyncio.gather(*(verifier.verify(problem, text, DEADLINE_S) for text in texts))

    return asyncio.run(all_of_them())


def _boxed(answers):
    return {name: rf"\boxed{{{answer}}}" for name, answer in answers.items()}


MATH = Problem("p", "How much?", answer="7")
CHOICE = Problem("p", "Which?", answer="A", domain="multiple-choice", choices=("x", "y"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "texts", "right"),
    [(MATH, _boxed(BOXED), r"\boxed{7}"), (MATH, TEXTS, r"\boxed{7}"), (CHOICE, CHOICES, "Answer: A")],
    ids=["boxed", "texts", "choices"],
)
def test_a_hostile_answer_scores_zero(verifier, problem, texts, right):
    verdicts = dict(zip(texts, _verdicts(verifier, problem, texts.values()), strict=True))
    assert {name: v for name, v in verdicts.items() if not isinstance(v, Scored) or v.value != 0.0} == {}
    assert [verdict.value for verdict in _verdicts(verifier, problem, [right] * 4)] == [1.0] * 4
