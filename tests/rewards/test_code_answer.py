"""Right and wrong programs, by the rules of LiveCodeBench; faults of programs and faults of the sandbox."""

import asyncio
import contextlib
import os
import signal
import threading

import psutil
import pytest

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.problems.problem import CodeTest
from exprl_megatron.processes.descendants import child_pids, existing
from exprl_megatron.rewards.code_answer import CodeVerifier, same_output
from exprl_megatron.rewards.code_sandbox import CodeSandbox, SandboxFailed
from exprl_megatron.rewards.containment import Limits

ADD = (CodeTest("1 2\n", "3\n"), CodeTest("-1 1", "0"))
PAIR = (CodeTest('[1, 2]\n"x"', '[[2, 1], "x"]', "swap"),)


@pytest.fixture(scope="module")
def verifier():
    with CodeVerifier(workers=2, limits=Limits(memory_bytes=2**29)) as verifier:
        yield verifier


def _verify(verifier, tests, program, deadline_s=60.0):
    return asyncio.run(verifier.verify(tests, f"So:\n```python\n{program}\n```\n", deadline_s))


@pytest.mark.parametrize(
    "program",
    [
        "print(sum(map(int, input().split())))",
        "print(sum(map(int, sys.stdin.read().split())))",
        "import sys\ninput = sys.stdin.readline\nprint(sum(map(int, input().split())))",
        "import os\na, b = os.read(0, 99).split()\nos.write(1, b'%d ' % (int(a) + int(b)))",
        "print(sum(map(int, open(0).read().split())), end='')",
        "if __name__ == '__main__':\n    print(float(sum(map(int, input().split()))))\n    exit()",
        "print(sum(map(int, input().split())))\nraise SystemExit(3)",
        "import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))",
        "import threading\nthreading.stack_size(2**27)\n"
        "def main():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()",
        "import numpy as np\nprint(np.array(input().split(), dtype=int).sum())",
        "import sys\nout = []\nsys.stdout.write(str(sum(map(int, input().split()))))\nquit()",
        "def deep(n):\n    return n and deep(n - 1)\ndeep(40000)\nprint(sum(map(int, input().split())))",
    ],
)
def test_right_programs_that_read_their_input(verifier, program):
    assert _verify(verifier, ADD, program) == Scored(1.0, "2 tests passed")


@pytest.mark.parametrize(
    "program",
    [
        "from __future__ import annotations\nprint(1)",
        "import argparse, asyncio, concurrent.futures, csv, difflib, glob, logging, multiprocessing, pathlib\nprint(1)",
        "import shutil, socket, subprocess, tempfile, tokenize, unittest, urllib.parse, uuid, zoneinfo\nprint(1)",
        "from sortedcontainers import SortedDict, SortedList, SortedSet\nprint(SortedList([2, 1])[0])",
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_STACK, (2**29, -1))\nprint(1)",
    ],
)
def test_what_solutions_import_and_set_first_is_there(verifier, program):
    assert _verify(verifier, [CodeTest("", "1")], program) == Scored(1.0, "1 tests passed")


DEEP = {
    "cache": "@functools.cache\ndef f(n):\n    return 1 if n == 0 else f(n - 1)\n",
    "max": "def f(n):\n    return 1 if n == 0 else max(map(f, [n - 1]))\n",
    "sum": "def f(n):\n    return 1 if n == 0 else sum(f(n - 1) for _ in range(1))\n",
    "missing": "class D(dict):\n"
    "    def __missing__(self, n):\n        return 1 if n == 0 else self[n - 1]\nf = D().__getitem__\n",
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize(
    "call", ["print(f(20_000))", "t = threading.Thread(target=lambda: print(f(20_000)))\nt.start()"]
)
def test_programs_recurse_as_deep_as_in_a_contest(verifier, kind, call):
    beginning = "import sys, functools, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
    assert _verify(verifier, [CodeTest("", "1")], beginning + DEEP[kind] + call) == Scored(1.0, "1 tests passed")


LOWER = """
import ctypes, resource
libc, limits = ctypes.CDLL(None), (ctypes.c_ulong * 2)(1, 1)
tried = [libc.setrlimit(0, limits), libc.prlimit(0, 0, limits, None), libc.syscall(160, 0, limits)]
tried.append(libc.syscall(302, 0, 0, limits, None))
try:
    resource.prlimit(0, resource.RLIMIT_CPU, (1, 1))
except PermissionError:
    tried.append(-1)
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
print(tried, resource.getrlimit(resource.RLIMIT_CPU)[0])
"""


def test_a_program_cannot_lower_its_limits_and_die_as_if_killed_from_outside():
    with CodeVerifier(limits=Limits(cpu_s=2)) as verifier:
        assert _verify(verifier, [CodeTest("", "[-1, -1, -1, -1, -1] 2")], LOWER).value == 1.0
        endless = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass"
        assert _verify(verifier, [CodeTest("", "1")], endless) == Scored(0.0, "test 1 of 1: out of time")


@pytest.mark.parametrize(
    "program",
    [
        "class Solution:\n    def swap(self, a: List[int], b: str):\n        return [a[::-1], b]",
        "def swap(a, b):\n    return a[::-1], b",
        "import numpy as np\ndef swap(a, b):\n    print('seen', a)\n    return [[np.int64(a[1]), a[0]], b]",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: list\n"
        "def swap(a, b):\n    return [P(a).a[::-1], b]\nif __name__ == '__main__':\n    swap(input())",
    ],
)
def test_right_programs_that_are_called(verifier, program):
    assert _verify(verifier, PAIR, program) == Scored(1.0, "1 tests passed")


@pytest.mark.parametrize(
    ("tests", "program", "evidence"),
    [
        (ADD, "print(3)", "test 2 of 2: expected '0', got '3'"),
        (ADD, "", "test 1 of 2: expected '3', got ''"),
        (ADD, "print(int(input()))", 'test 1 of 2: error: "ValueError: invalid literal for int()'),
        (ADD, "print(3", "test 1 of 2: error: \"SyntaxError: '(' was never closed\""),
        (ADD, "print(3)\n1 / 0", "test 1 of 2: error: 'ZeroDivisionError: division by zero'"),
        (ADD, "import os\nprint(3, flush=True)\nos._exit(1)", "test 1 of 2: error: it ended without a message"),
        (ADD, "import ctypes\nctypes.string_at(0)", "test 1 of 2: error: 'ended by SIGSEGV'"),
        (ADD, "x = bytearray(2**30)", "test 1 of 2: error: 'MemoryError'"),
        (ADD, "import torch", "test 1 of 2: error: \"ModuleNotFoundError: No module named 'torch'\""),
        (ADD, "while True: print(10**999)", "test 1 of 2: too much output"),
        (PAIR, "def swap(a, b): return [a, b]", "test 1 of 1: expected '[[2, 1], \"x\"]', got '[[1, 2], \"x\"]'"),
        (
            PAIR,
            "def swap(a): return a",
            "test 1 of 1: error: 'TypeError: swap() takes 1 positional argument but 2 were",
        ),
        (PAIR, "def other(a): return a", "test 1 of 1: error: 'NameError: the program does not define swap'"),
        (PAIR, "def swap(a, b): return {1}", "test 1 of 1: error: 'TypeError: the value is a set, which JSON"),
        (PAIR, "def swap(a, b): exit()", "test 1 of 1: expected '[[2, 1], \"x\"]', got ''"),
    ],
)
def test_wrong_programs_score_zero_and_the_evidence_says_why(verifier, tests, program, evidence):
    verdict = _verify(verifier, tests, program)
    assert isinstance(verdict, Scored)
    assert verdict.value == 0.0
    assert verdict.evidence.startswith(evidence)


@pytest.mark.slow
def test_the_deadline_is_for_all_tests_together(verifier):
    tests = (CodeTest("0.1", ""), *(CodeTest("0.9", "") for _ in range(9)))
    verdict = _verify(verifier, tests, "import time\ntime.sleep(float(input()))", deadline_s=4.0)
    assert verdict.value == 0.0
    assert verdict.evidence.endswith("out of time")
    assert not verdict.evidence.startswith(("test 1 ", "test 2 "))


def test_a_trace_without_a_program_scores_zero(verifier):
    assert asyncio.run(verifier.verify(ADD, "3", 60.0)) == Scored(0.0, "no program")


def test_repeated_runs_are_alike():
    program = "import numpy\nprint(random.random(), hash('a'), numpy.random.rand(), list({'a', 'b', 'c', 'd', 'e'}))"
    seen = set()
    for _ in range(2):
        with CodeVerifier() as verifier:
            seen |= {_verify(verifier, [CodeTest("", "?")], program).evidence for _ in range(2)}
    assert len(seen) == 1


@pytest.mark.parametrize("test", [CodeTest("[1", "1", "swap"), CodeTest("1", "", "swap"), CodeTest("one", "1", "swap")])
def test_an_unreadable_test_is_an_abstention(verifier, test):
    verdict = _verify(verifier, [test], "def swap(*a): return 1")
    assert isinstance(verdict, Abstained)
    assert verdict.reason == "verifier-error"


def test_many_at_once_get_their_own_verdicts(verifier):
    async def all_of_them():
        tests = [(CodeTest(str(i), str(i % 3)),) for i in range(12)]
        return await asyncio.gather(*(verifier.verify(t, "```python\nprint(input())\n```", 60.0) for t in tests))

    assert [verdict.value for verdict in asyncio.run(all_of_them())] == [1.0] * 3 + [0.0] * 9


@pytest.mark.slow
@pytest.mark.parametrize("process", ["worker", "zygote"])
def test_a_worker_that_dies_is_replaced_and_the_program_run_again(process):
    before = set(child_pids(os.getpid()))
    with CodeVerifier() as verifier:
        assert _verify(verifier, ADD, "print(3)").value == 0.0

        async def killed():
            task = asyncio.create_task(
                verifier.verify([CodeTest("", "")], "```python\nimport time\ntime.sleep(1)\n```", 120.0)
            )
            while not _programs(before):
                assert not task.done()
                await asyncio.sleep(0.01)
            (worker,) = set(child_pids(os.getpid())) - before
            os.kill(worker if process == "worker" else child_pids(worker)[0], signal.SIGKILL)
            return await task

        assert asyncio.run(killed()) == Scored(1.0, "1 tests passed")
        assert _verify(verifier, ADD, "print(sum(map(int, input().split())))").value == 1.0
    assert set(child_pids(os.getpid())) <= before


def _programs(before):
    """The running programs: each is a child of a zygote, which is a child of a worker."""
    workers = set(child_pids(os.getpid())) - before
    return [program for worker in workers for zygote in child_pids(worker) for program in child_pids(zygote)]


def test_a_program_killed_from_outside_is_run_again():
    before = set(child_pids(os.getpid()))
    with CodeVerifier() as verifier:
        assert _verify(verifier, ADD, "print(3)").value == 0.0

        async def killed():
            program = "```python\nimport time\nprint(1, flush=True)\ntime.sleep(1)\n```"
            task = asyncio.create_task(verifier.verify([CodeTest("", "1")], program, 120.0))
            while not (programs := _programs(before)):
                assert not task.done()
                await asyncio.sleep(0.01)
            os.kill(programs[0], signal.SIGKILL)
            return await task

        assert asyncio.run(killed()) == Scored(1.0, "1 tests passed")


def test_a_program_that_is_killed_each_time_is_wrong_where_others_run():
    """As the kernel does where memory runs out."""
    before = set(child_pids(os.getpid()))
    ended = threading.Event()

    def kill_them():
        while not ended.is_set():
            for program in existing(_programs(before)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if program.memory_info().rss > 2**28:
                        program.kill()
            ended.wait(0.01)

    with CodeVerifier(limits=Limits(memory_bytes=2**30)) as verifier:
        assert _verify(verifier, ADD, "print(3)").value == 0.0
        killer = threading.Thread(target=kill_them)
        killer.start()
        try:
            verdict = _verify(verifier, ADD, "import time\nx = bytearray(b'x') * 2**29\ntime.sleep(9)")
        finally:
            ended.set()
            killer.join()
    assert verdict == Scored(0.0, "test 1 of 2: the sandbox fails with this program alone")


def test_where_a_harmless_program_fails_too_it_is_an_abstention(monkeypatch):
    asked = []

    def fail(self, program, *_):
        asked.append(program)
        raise SandboxFailed("out of processes")

    monkeypatch.setattr(CodeSandbox, "run", fail)
    with CodeVerifier() as verifier:
        verdict = _verify(verifier, ADD, "print(3)")
    assert verdict == Abstained("verifier-error", "out of processes")
    assert [program.strip() for program in asked] == ["print(3)", "print(3)", ""]


def test_an_input_that_cannot_be_encoded_is_an_abstention_and_costs_no_worker():
    with CodeVerifier() as verifier:
        assert _verify(verifier, ADD, "print(3)").value == 0.0
        workers = set(child_pids(os.getpid()))
        verdict = _verify(verifier, [CodeTest("\ud800", "1")], "print(1)")
        assert isinstance(verdict, Abstained)
        assert verdict.reason == "verifier-error"
        assert set(child_pids(os.getpid())) == workers


@pytest.mark.slow
def test_one_test_is_bounded_by_the_clock_besides_the_whole_program():
    with CodeVerifier(limits=Limits(wall_s=2.0)) as verifier:
        verdict = _verify(verifier, ADD, "import time\ntime.sleep(50)\nprint(3)", deadline_s=1000.0)
        assert verdict == Scored(0.0, "test 1 of 2: out of time")
        # Five tests take longer, each far from it.
        some = "import time\ntime.sleep(0.5)\nprint(sum(map(int, input().split())))"
        assert _verify(verifier, ADD[:1] * 5, some, deadline_s=1000.0) == Scored(1.0, "5 tests passed")


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True),
        ("  1  \n2 ", "1\n2", True),
        ("\n\n1\r\n2\n\n", "1\n2", True),
        ("1.0 2", "1 2.00", True),
        ("1e2", "100", True),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("a 1.0", "a 1", False),
        ("1 2", "1 2 3", False),
        ("1\n\n2", "1\n2", False),
        ("1", "1\n2", False),
        ("0.1000001", "0.1", False),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("yes", "YES", False),
        ("", "", True),
    ],
)
def test_same_output(output, expected, same):
    assert same_output(output, expected) is same
