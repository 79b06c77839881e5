"""Each domain is verified in its own way; what nobody can verify is an abstention."""

import asyncio

import pytest

from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.problems.problem import CodeTest, Problem
from exprl_megatron.rewards.containment import Limits
from exprl_megatron.rewards.verifier import AnswerVerifier, default_workers

PRINT = "```python\nprint(input())\n```"


@pytest.fixture(scope="module")
def verifier():
    with AnswerVerifier() as verifier:
        yield verifier


def _verify(verifier, problem, text, deadline_s=60.0):
    return asyncio.run(verifier.verify(problem, text, deadline_s))


@pytest.mark.parametrize(
    ("problem", "text", "verdict"),
    [
        (Problem("1", "?", answer="1/2"), r"\boxed{0.5}", Scored(1.0, "0.5")),
        (Problem("1", "?", answer="1/2"), r"\boxed{2}", Scored(0.0, "2")),
        (Problem("1", "?", answer="0"), "ans 0", Scored(1.0, "0")),
        (Problem("2", "?", answer="B", domain="multiple-choice", choices=("x", "y")), "Answer: y", Scored(1.0, "B")),
        (Problem("3", "?", domain="code", tests=(CodeTest("a", "a"),)), PRINT, Scored(1.0, "1 tests passed")),
        (Problem("3", "?", domain="code", tests=(CodeTest("a", "a"),)), "a", Scored(0.0, "no program")),
    ],
)
def test_each_domain_has_its_verifier(verifier, problem, text, verdict):
    assert _verify(verifier, problem, text) == verdict


@pytest.mark.parametrize(
    "problem",
    [
        Problem("1", "?"),
        Problem("2", "?", domain="multiple-choice", choices=("x", "y")),
        Problem("3", "?", domain="code", answer="print(1)"),
        Problem("4", "Why?", domain="science", answer="Because."),
    ],
)
def test_what_nobody_can_verify_is_an_abstention(verifier, problem):
    verdict = _verify(verifier, problem, r"\boxed{A}")
    assert isinstance(verdict, Abstained)
    assert verdict.reason == "no-verifier"


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (3, 3), (8, 8), (96, 8)])
def test_workers_are_one_per_core_and_at_most_eight(monkeypatch, cores, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert default_workers() == workers
    assert VerifierConfig().workers == "auto"


class Recorder:
    """In place of a domain's verifier: keeps what it is made with and what it is asked."""

    def __init__(self, *settings):
        self.settings, self.asked = settings, []

    async def verify(self, *asked):
        self.asked.append(asked)
        return Scored(1.0, "")

    def close(self):
        self.asked.append("closed")


def test_settings_and_deadlines_reach_the_verifier_of_their_domain(monkeypatch):
    module = "exprl_megatron.rewards.verifier"
    monkeypatch.setattr(f"{module}.MathVerifier", Recorder)
    monkeypatch.setattr(f"{module}.CodeVerifier", Recorder)
    limits, tests = Limits(wall_s=7.0), (CodeTest("a", "a"),)
    with AnswerVerifier(3, "code", limits) as verifier:
        _verify(verifier, Problem("1", "?", answer="1"), "one", 4.0)
        _verify(verifier, Problem("2", "?", domain="code", tests=tests), "two", 5.0)
    math, code = verifier._math, verifier._code
    assert (math.settings, math.asked) == ((3, "code"), [("1", "one", 4.0), "closed"])
    assert (code.settings, code.asked) == ((3, limits), [(tests, "two", 5.0), "closed"])
