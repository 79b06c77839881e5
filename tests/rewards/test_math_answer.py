"""The verifier: right, wrong, no answer, and comparisons that never end."""

import asyncio
import signal
import subprocess
import sys

import psutil
import pytest
from helpers.processes import left_behind

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.processes.descendants import existing
from exprl_megatron.rewards.math_answer import MathVerifier

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(workers=2) as verifier:
        yield verifier


def _verify(verifier, answer, text, deadline_s=60.0):
    return asyncio.run(verifier.verify(answer, text, deadline_s))


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("36", r"\boxed{36}", 1.0),
        ("36", r"\boxed{36.0}", 1.0),
        ("1/2", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\frac12", r"\boxed{0.5}", 1.0),
        ("1200", "#### 1,200", 1.0),
        ("x^2+1", r"\boxed{1+x^2}", 1.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
        ("36", "### 12 * 3 = 36 ans 36", 1.0),
        ("B", r"\boxed{B}", 1.0),
        ("36", r"\boxed{36} and on, until the length lim", 1.0),
        ("36", r"\boxed{36} or rather \boxed{37}", 0.0),
        ("36", "ans 35", 0.0),
        ("36", r"\boxed{\frac{}}", 0.0),
        ("A", r"\boxed{B}", 0.0),
    ],
)
def test_right_answers_score_one_and_wrong_ones_zero(verifier, answer, text, value):
    verdict = _verify(verifier, answer, text)
    assert isinstance(verdict, Scored)
    assert verdict.value == value


def test_no_answer_scores_zero(verifier):
    assert _verify(verifier, "36", "I do not know.") == Scored(0.0, "no answer")


def test_a_right_answer_that_cannot_be_read_is_an_abstention(verifier):
    verdict = _verify(verifier, "}{", r"\boxed{36}")
    assert isinstance(verdict, Abstained)
    assert verdict.reason == "verifier-error"


def test_many_at_once_get_their_own_verdicts_from_several_loops(verifier):
    async def all_of_them():
        return await asyncio.gather(*(verifier.verify(str(i % 3), f"ans {i}", 60.0) for i in range(12)))

    for _ in range(2):
        assert [verdict.value for verdict in asyncio.run(all_of_them())] == [1.0] * 3 + [0.0] * 9


def test_an_answer_that_hangs_the_comparison_is_wrong_and_its_process_is_replaced():
    before = set(psutil.Process().children())
    with MathVerifier() as verifier:
        (hung,) = set(psutil.Process().children()) - before
        verdict = _verify(verifier, "36", ENDLESS, deadline_s=2.0)
        assert isinstance(verdict, Scored)
        assert verdict.value == 0.0
        assert not hung.is_running()
        assert _verify(verifier, "36", "ans 36") == Scored(1.0, "36")


HOSTILE = [
    ENDLESS[7:-1],
    "(10^{10})!",
    "(" * 480 + "1" + ")" * 480,
    r"\binom{10^9}{5\cdot 10^8}",
    r"\sum_{n=1}^{10^9} n^{-3}",
    r"\prod_{i=1}^{10^8} i",
    "10^{10^{10}}",
    r"\int\int\int\int e^{x^2}dx",
    r"7\mod 10^{10^{10}}",
    "x_{" * 200 + "}" * 200,
    "{" * 400 + "}" * 400,
    r"\frac" * 150,
    "1" * 900,
    "1e999999999",
    "7^{1e9}",
    r"\text{" * 100,
    "\x00",
    "\ud800",
    "|" * 300,
    r"\pm" * 200,
    "0/0",
    "10^9!!!!",
]


@pytest.mark.slow
@pytest.mark.parametrize("answer", HOSTILE, ids=[ascii(answer[:20]) for answer in HOSTILE])
def test_an_answer_that_makes_its_verifier_fail_is_wrong(verifier, answer):
    assert _verify(verifier, "7", rf"\boxed{{{answer}}}", deadline_s=2.0).value == 0.0


@pytest.mark.slow
def test_a_right_answer_that_hangs_is_an_abstention():
    with MathVerifier() as verifier:
        verdict = _verify(verifier, "(" * 480 + "1" + ")" * 480, r"\boxed{36}", deadline_s=2.0)
    assert isinstance(verdict, Abstained)
    assert verdict.reason == "verifier-timeout"


def test_a_process_that_dies_is_replaced_and_asked_again():
    before = set(psutil.Process().children())
    with MathVerifier() as verifier:
        assert _verify(verifier, "36", "ans 36").value == 1.0
        (process,) = set(psutil.Process().children()) - before
        process.kill()
        assert _verify(verifier, "36", r"\boxed{36}") == Scored(1.0, "36")
        assert _verify(verifier, "36", "ans 36").value == 1.0
    assert set(psutil.Process().children()) <= before


def test_the_worker_loads_no_torch():
    code = "import sys, exprl_megatron.rewards.math_worker, math_verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_an_endless_comparison_whose_trainer_was_killed_ends_by_itself():
    code = (
        "import asyncio, os, signal\n"
        "from exprl_megatron.processes.descendants import child_pids\n"
        "from exprl_megatron.rewards.math_answer import MathVerifier\n"
        "from exprl_megatron.rewards.worker_process import WorkerProcess\n"
        "verifier = MathVerifier()\n"
        "print(child_pids(os.getpid())[0], flush=True)\n"
        "asyncio.run(verifier.verify('36', 'ans 36', 60.0))\n"
        # The request has been sent then.
        "WorkerProcess._reply = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"asyncio.run(verifier.verify('36', {ENDLESS!r}, 2.0))\n"
    )
    trainer = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    assert trainer.returncode == -signal.SIGKILL
    left = left_behind(existing([int(trainer.stdout)]))
    for worker in left:
        worker.kill()
    assert left == []


@pytest.fixture(scope="module")
def released():
    with MathVerifier(variant="code") as verifier:
        assert _verify(verifier, "1", r"\boxed{1}").value == 1.0
        yield verifier


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("36", r"\boxed{35} or rather \boxed{36}", 1.0),
        ("36", r"\boxed{36} or rather \boxed{35}", 0.0),
        (r"\frac12", r"\boxed{0.5} and on, until the length lim", 1.0),
        ("36", "#### 36", 0.0),
        ("36", "ans 36", 0.0),
        ("36", "36", 0.0),
        ("36", r"\boxed {36}", 0.0),
        ("36", r"\boxed{}", 0.0),
        ("36", r"\boxed{36} " + "x" * 900, 1.0),
        ("36", r"\boxed{36} " + "x" * 1000, 0.0),
        ("36", "x" * 5000 + r"\boxed{36}", 1.0),
        ("}{", r"\boxed{36}", 0.0),
        ("36", ENDLESS, 0.0),
    ],
)
def test_the_released_reward_counts_boxes_only_and_never_abstains(released, answer, text, value):
    verdict = _verify(released, answer, text)
    assert isinstance(verdict, Scored)
    assert verdict.value == value
