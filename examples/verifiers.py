"""Verifiers: is the answer of a trace right? `verifier.domains.NAME: examples.verifiers:FUNCTION`."""

import re

from exprl_megatron.api import Abstained, Judgement, Problem, Scored, Trace

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


async def within_one_percent(problem: Problem, trace: Trace) -> Judgement:
    """Return 1 where the last number of the trace is within 1 % of the problem's answer, as for measured values.

    An async function may wait for a service of your own; exceptions are abstentions.
    """
    if problem.answer is None:
        return Abstained("no-answer", f"problem {problem.id} has no answer to compare with")
    numbers = _NUMBER.findall(trace.text)
    if not numbers:
        return Scored(0.0, "the trace has no number")
    wanted, found = float(problem.answer), float(numbers[-1])
    right = abs(found - wanted) <= 0.01 * abs(wanted)
    return Scored(float(right), f"{found:g} instead of {wanted:g}" if not right else f"{found:g}")


class Counter:
    """Returns 1 where the trace has as many words as the problem asks for.

    A class is instantiated once in each process, without arguments, so that it may keep a connection or a table.
    """

    def __init__(self) -> None:
        self._split = re.compile(r"\S+").findall

    def __call__(self, problem: Problem, trace: Trace) -> Judgement:
        words = len(self._split(trace.text))
        return Scored(float(problem.answer == str(words)), f"{words} words")
