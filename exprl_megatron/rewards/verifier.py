"""Verification of a trace's final answer, by the verifier of the problem's domain."""

import os
from typing import Literal

from exprl_megatron.judging.judgement import Abstained, Judgement
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rewards.code_answer import CodeVerifier
from exprl_megatron.rewards.containment import DEFAULT_LIMITS, Limits
from exprl_megatron.rewards.math_answer import DEADLINE_S, MathVariant, MathVerifier
from exprl_megatron.rewards.multiple_choice import grade_choice

MAX_WORKERS = 8


def default_workers() -> int:
    """Return the number of cores that this process may use, at most `MAX_WORKERS`."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


class AnswerVerifier:
    """Verifies math by math-verify, multiple choice by the letter, and code by running its tests.

    It works from any event loop; `close` ends the processes.

    Args:
        workers: number of processes for math, which start immediately, and for code, which start with the first
            programs (`auto`: `default_workers()`).
        variant: how mathematical answers are verified.
        code_limits: limits of one test of a program.
    """

    def __init__(
        self,
        workers: int | Literal["auto"] = "auto",
        variant: MathVariant = "recommended",
        code_limits: Limits = DEFAULT_LIMITS,
    ):
        count = default_workers() if workers == "auto" else workers
        self._math = MathVerifier(count, variant)
        self._code = CodeVerifier(count, code_limits)

    async def verify(self, problem: Problem, trace_text: str, deadline_s: float = DEADLINE_S) -> Judgement:
        """Score 1.0 where the trace's answer is right, else 0.0; the evidence is the answer that was found.

        `deadline_s` (seconds) starts when a process is free; it limits the comparison of a mathematical answer, or all
        tests of a program together. Abstains with `no-verifier` where the problem is open-ended or has no answer or
        tests, and with `verifier-timeout`, `verifier-error` or `no-sandbox` where the verifier itself failed.

        Raises:
            RuntimeError: the process of math-verify cannot be started.
        """
        if problem.domain == "code" and problem.tests:
            return await self._code.verify(problem.tests, trace_text, deadline_s)
        if problem.domain == "math" and problem.answer is not None:
            return await self._math.verify(problem.answer, trace_text, deadline_s)
        if problem.domain == "multiple-choice" and problem.answer is not None:
            return grade_choice(problem.answer, problem.choices, trace_text)
        return Abstained("no-verifier", f"{problem.domain} without an answer that can be checked")

    def close(self) -> None:
        """End the processes after the running verifications."""
        self._math.close()
        self._code.close()

    def __enter__(self) -> "AnswerVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
