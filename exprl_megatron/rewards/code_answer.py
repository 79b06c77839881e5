"""Verification of programs: the last program of a trace runs in a sandbox, and its output is compared here."""

import asyncio
import json
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.problems.problem import CodeTest
from exprl_megatron.rewards.code_sandbox import CodeSandbox, ProgramOutcome, SandboxFailed, SandboxUnavailable
from exprl_megatron.rewards.containment import DEFAULT_LIMITS, Limits
from exprl_megatron.rewards.extraction import extract_program

_SHOWN = 100
_PROBE_S = 30.0
"""Seconds that a program which does nothing may take."""
_OVERRUN = {"time": "out of time", "output": "too much output"}


class CodeVerifier:
    """Runs programs in at most `workers` sandboxes concurrently; works from any event loop. `close` ends them.

    Args:
        workers: number of sandboxes.
        limits: limits of one test.
        optional_layers: whether to use the optional layers of containment (containment.py).
    """

    def __init__(self, workers: int = 1, limits: Limits = DEFAULT_LIMITS, optional_layers: bool = True):
        self._limits = limits
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="code-verifier")
        self._idle: queue.SimpleQueue[CodeSandbox] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(CodeSandbox(limits, optional_layers=optional_layers))

    async def verify(self, tests: Sequence[CodeTest], trace_text: str, deadline_s: float) -> Judgement:
        """Score 1.0 where the last Python block of the trace passes every test, else 0.0; the evidence names the test.

        All tests together may take `deadline_s` seconds, without the time before a sandbox is free. A program fails
        if it takes longer, exceeds a limit of a single test, or makes the sandbox fail twice while the sandbox still
        runs another program. Abstains with `no-sandbox` where this machine cannot contain programs,
        and with `verifier-error` where the sandbox itself fails or a test is unreadable.
        """
        program = extract_program(trace_text)
        if program is None:
            return Scored(0.0, "no program")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._test, tests, program, deadline_s)

    def close(self) -> None:
        """End the sandboxes after the running programs."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def __enter__(self) -> "CodeVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _test(self, tests: Sequence[CodeTest], program: str, deadline_s: float) -> Judgement:
        sandbox = self._idle.get()
        try:
            sandbox.layers()  # the start does not count as the program's time
            end = time.monotonic() + deadline_s
            for number, test in enumerate(tests, start=1):
                fault = _fault(sandbox, program, test, min(self._limits.wall_s, end - time.monotonic()))
                if fault is not None:
                    return Scored(0.0, f"test {number} of {len(tests)}: {fault}")
        except SandboxUnavailable as error:
            return Abstained("no-sandbox", str(error))
        except (SandboxFailed, _UnreadableTest) as error:
            return Abstained("verifier-error", str(error))
        finally:
            self._idle.put(sandbox)
        return Scored(1.0, f"{len(tests)} tests passed")


class _UnreadableTest(Exception):
    """The arguments or the expected value of a test are not JSON."""


def _fault(sandbox: CodeSandbox, program: str, test: CodeTest, left_s: float) -> str | None:
    """Describe the program's failure in this test; None where it passes."""
    expected = _read_call(test) if test.function else None
    if left_s <= 0:
        return _OVERRUN["time"]
    outcome = _run_with_retry(sandbox, program, test, left_s)
    if outcome is None:
        return "the sandbox fails with this program alone"
    if outcome.ending in _OVERRUN:
        return _OVERRUN[outcome.ending]
    if outcome.ending == "failed":
        return f"error: {_last_line(outcome)}"
    right = _same_value(outcome.output, expected) if test.function else same_output(outcome.output, test.output)
    return None if right else f"expected {_shorten(test.output)}, got {_shorten(outcome.output)}"


def _run_with_retry(sandbox: CodeSandbox, program: str, test: CodeTest, wall_s: float) -> ProgramOutcome | None:
    """Return the outcome of the program; None where the program made the sandbox fail; raises SandboxFailed."""
    try:
        return sandbox.run(program, test.input, test.function, wall_s)
    except SandboxFailed:
        pass  # the next runs show whether chance, the machine or this program is the cause
    try:
        return sandbox.run(program, test.input, test.function, wall_s)
    except SandboxFailed:
        # This program is harmless: a failure here is caused by the machine or the test.
        sandbox.run("", test.input, None, _PROBE_S)
        return None


def same_output(output: str, expected: str) -> bool:
    """Return whether the lines are equal, without surrounding white space, as text or as decimal numbers.

    This is the rule of LiveCodeBench.
    """
    lines, expected_lines = (text.strip().split("\n") for text in (output, expected))
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def _same_line(line: str, expected: str) -> bool:
    if line.strip() == expected.strip():
        return True
    numbers, expected_numbers = line.split(), expected.split()
    if len(numbers) != len(expected_numbers):
        return False
    try:
        return all(Decimal(a) == Decimal(b) for a, b in zip(numbers, expected_numbers, strict=True))
    except InvalidOperation:
        return False


def _read_call(test: CodeTest) -> object:
    """Parse the value that the call should return."""
    try:
        for line in filter(str.strip, test.input.split("\n")):
            json.loads(line)
        return json.loads(test.output)
    except ValueError as error:
        raise _UnreadableTest(f"a test of {test.function} is not JSON: {error}") from error


def _same_value(output: str, expected: object) -> bool:
    """Compare two values as JSON, so that tuples are lists; numbers are compared exactly, as LiveCodeBench does."""
    try:
        return json.loads(output) == expected
    except (ValueError, RecursionError):
        return False


def _last_line(outcome: ProgramOutcome) -> str:
    lines = outcome.error.strip().splitlines()
    return _shorten(lines[-1]) if lines else "it ended without a message"


def _shorten(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
