"""A process that runs math-verify, so that it can be killed; it reads and writes JSON lines.

A request is {"gold": text, "answer": text or null, "limit_s": seconds, "variant": name}; the reply is {"equal": bool}
(without an answer: whether the gold can be read), or {"reason": "verifier-error", "error": text}. The process
prints {"ready": true} when it is ready, and exits at the end of its input.
"""

import json
import logging
import os
import resource
import signal
import sys
from fractions import Fraction
from typing import Any

from exprl_megatron.rewards.answer_markup import normalize_answer
from exprl_megatron.rewards.math_forms import same_answer, same_value
from exprl_megatron.rewards.prime_answer import same_as_prime

MEMORY_BYTES = 4 * 2**30


def serve() -> None:
    """Answer requests from standard input until it ends."""
    # Output of libraries must not mix with the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # The trainer handles an interrupt at the terminal, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    parse("$1$", parsing_timeout=None)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        # The parent kills a process that hangs; the alarm ends one whose parent was killed.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["limit_s"])
        try:
            equal = {"recommended": _equal, "prime": _equal_as_prime, "code": _equal_as_released}[request["variant"]]
            reply: dict[str, bool | str] = {"equal": equal(parse, verify, request["gold"], request["answer"])}
        except Exception as error:  # the parent gets every error
            reply = {"reason": "verifier-error", "error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


def _equal(parse, verify, gold: str, answer: str | None) -> bool:
    """Compare an answer with the gold; without an `answer`, only read `gold`.

    An answer with which math-verify fails is not equal. Raises ValueError where `gold` cannot be read.
    """
    wanted = _parsed(parse, normalize_answer(gold))
    if not wanted:
        raise ValueError(f"math-verify cannot read the right answer {gold!r}")
    if answer is None:
        return True

    def by_math_verify(first: str, second: str) -> bool:
        one, other = _parsed(parse, first), _parsed(parse, second)
        same = verify(one, other, timeout_seconds=None, raise_on_error=True)
        return same and not _tiny_and_different(one[0], other[0])

    try:
        return same_answer(gold, answer, by_math_verify)
    except Exception:  # the gold was read, so that the answer is the cause of every exception
        return False


def _tiny_and_different(one: Any, other: Any) -> bool:
    """Return whether two small numbers are equal only because math-verify rounds to six decimals."""
    try:
        first, second = [Fraction(str(value.evalf(20))) for value in (one, other)]
    except (AttributeError, ValueError, TypeError):
        return False
    return max(abs(first), abs(second)) < 1 and not same_value(first, second)


def _equal_as_released(parse, verify, gold: str, boxed_tail: str) -> bool:
    """Compare as the released code does; math-verify finds the answer in the trace's text from its last box on."""
    answer = parse(boxed_tail, parsing_timeout=None, raise_on_error=True)
    return verify(_parsed(parse, gold), answer, strict=True, timeout_seconds=None, raise_on_error=True)


def _equal_as_prime(parse, verify, gold: str, answer: str) -> bool:
    """Compare numbers as the released first stage does, and anything else by math-verify."""

    def by_math_verify(first: str, second: str) -> bool:
        one, other = _parsed(parse, first), _parsed(parse, second)
        return verify(one, other, strict=False, timeout_seconds=None, raise_on_error=True)

    return same_as_prime(gold, answer, by_math_verify)


def _parsed(parse, text: str) -> list:
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)


def _limit_memory() -> None:
    """Limit the memory of this process, since an expression can become arbitrarily large."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    serve()
