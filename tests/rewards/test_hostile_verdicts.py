"""Programs that want another verdict than the one that they deserve: each scores 0, and the verifier works on."""

import asyncio
import platform
from pathlib import Path

import pytest

from exprl_megatron.judging.judgement import Scored
from exprl_megatron.problems.problem import CodeTest
from exprl_megatron.rewards.code_answer import CodeVerifier
from exprl_megatron.rewards.containment import Limits

WORKERS = 6
LIMITS = Limits(cpu_s=1, wall_s=4.0, memory_bytes=2**29, output_bytes=2**20, threads=8)
EARLIER = "an-earlier-program-wrote-this"

HOSTILE = {
    "sleeps in an exit function": "import atexit, time\natexit.register(time.sleep, 1e6)\nprint('right', flush=True)",
    "leaves a thread asleep": "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,)).start()",
    "waits for what never comes": "import os, select\nos.closerange(0, 64)\nselect.select([], [], [])",
    "dies of a timer": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile True: pass",
    "dies of a profiling timer": "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0.05)\nwhile True: pass",
    "aborts": "import os\nprint('right', flush=True)\nos.abort()",
    "kills itself": """
import os, signal, ctypes
libc = ctypes.CDLL(None)
for kill in (
    lambda: os.kill(os.getpid(), 9), lambda: os.kill(0, 9), lambda: signal.raise_signal(9),
    lambda: signal.pthread_kill(libc.pthread_self(), 9), lambda: libc.syscall(234, os.getpid(), os.getpid(), 9),
):
    try:
        kill()
    except (OSError, OverflowError):
        pass
print('alive')""",
    "stops itself": "import os, signal\ntry: signal.raise_signal(signal.SIGSTOP)\nexcept OSError: print('alive')",
    "calls the kernel in 32 bits": """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex('b801000000bb00000000cd80c3'))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()""",
    "computes where no signal is looked at": "x = 7 ** 10 ** 8",
    "matches for ever": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "exhausts the parser": "import ast\ntry: ast.literal_eval('(' * 10**6)\nfinally: eval('-' * 10**6 + '1')",
    "overflows the stack": """
import sys
sys.setrecursionlimit(2**31 - 1)
class Deep:
    def __repr__(self): return repr(self) + repr([self])
repr(Deep())""",
    "takes memory until it is killed": """
x = []
while True:
    try: x.append(bytearray(b'x') * 2**20)
    except MemoryError: pass""",
    "starts threads that never end": """
import threading
def loop():
    while True: pass
while True:
    try: threading.Thread(target=loop).start()
    except RuntimeError: pass""",
    "writes what the worker writes": """
import os
for fd in range(64):
    for message in (b'contained', b'e', b'threads', bytes(16), b'{"ending": "finished", "output": "right"}\\n'):
        try: os.write(fd, message)
        except OSError: pass""",
    "patches the comparison": """
import sys, builtins, json
for module in list(sys.modules.values()):
    for name in ('same_output', '_same_value', '_same_line', '_fault', 'Watch', 'Scored', 'loads', 'dumps'):
        if hasattr(module, name): setattr(module, name, lambda *a, **k: True)
builtins.all = builtins.len = builtins.isinstance = lambda *a: True""",
    "prints an object that equals everything": """
class Anything(str):
    __eq__ = __contains__ = __ge__ = lambda *_: True
    __hash__ = str.__hash__
print(Anything('wrong'))""",
    "replaces what writes its output": """
import sys
class Output:
    def write(self, text): return len(text)
    def flush(self): raise SystemExit(0)
sys.stdout = sys.__stdout__ = sys.stderr = Output()
print('right')""",
    "empties all modules": """
import sys, builtins
names = [vars(m) for m in sys.modules.values() if m is not None and m is not builtins]
for module in names: module.clear()
vars(builtins).clear()""",
    "hooks imports and traces": """
import sys, builtins, threading
class Finder:
    def find_spec(self, *_): return self
    find_module = load_module = create_module = find_spec
sys.meta_path.insert(0, Finder())
builtins.__import__ = lambda *_: sys
def trace(*_):
    while True: pass
threading.settrace(trace)
sys.setprofile(trace)""",
    "ends by a watchdog of its own": """
import faulthandler
faulthandler.dump_traceback_later(0.05, exit=True)
while True: pass""",
    "raises what cannot be shown": """
class Silent(BaseException):
    def __str__(self): raise self
    __repr__ = __str__
raise Silent from ExceptionGroup('x', [ValueError()] * 10**5)""",
    "leaves by every exit": "import os, sys\ntry: sys.exit(lambda: 1)\nfinally: os._exit(0)",
    "writes no text": "import os\nos.write(1, bytes(range(256)) * 4000)",
    "writes to a closed output": "import os\nos.close(1)\nprint('right')",
    "reads processes and shared memory": r"""
import os, ctypes, mmap
libc = ctypes.CDLL(None)
found = []
for path in ('/proc/%d/mem', '/proc/%d/environ', '/proc/%d/fd', '/proc/%d/maps'):
    for pid in (os.getppid(), os.getpid(), 1):
        try: found.append(os.open(path % pid, 0))
        except OSError: pass
page = ctypes.create_string_buffer(4096)
ptrace, process_vm_readv = (101, 16, os.getppid(), 0, 0), (310, os.getppid(), page, 1, page, 1, 0)
shmget, shmctl = (29, 1, 4096, 0o1600), (31, 0, 0, page)
ways = [ptrace, process_vm_readv, shmget, shmctl]
for number, *arguments in ways:
    if libc.syscall(number, *arguments) >= 0: found.append(number)
for name in ('/x', '/psm', '/torch'):
    if libc.shm_open(name.encode(), 0o102, 0o600) >= 0: found.append(name)
print('right' if found else 'nothing')""",
    "returns with processes left behind": """
import os, time
for _ in range(50):
    try:
        if os.fork() == 0: time.sleep(1e6)
        print('right')
    except OSError: pass""",
    "unpickles a bomb": """
import pickle, os
class Bomb:
    def __reduce__(self): return os._exit, (0,)
pickle.loads(pickle.dumps(Bomb()))""",
}

CALLED = {
    "returns what never ends": """
class D(dict):
    def items(self):
        while True: yield 'a', 1
def f(): return D(a=1)""",
    "returns itself": "def f():\n    x = []\n    x.append(x)\n    return x",
    "returns too deep a list": "def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "returns what looks like numpy": """
class T: pass
T.__module__ = 'numpy'
T.item = lambda self: T()
def f(): return T()""",
    "writes its value itself": "import os\ndef f():\n    os.write(3, b'[' * 10**5)\n    os._exit(0)",
    "returns what equals everything": """
class E(int):
    __eq__ = lambda *_: True
    __hash__ = int.__hash__
def f(): return E(6)""",
}

READ_MEMORY = (Path(__file__).parent / "hostile" / "read_memory.py").read_text()


@pytest.fixture(scope="module", params=[True, False], ids=["every layer", "needed layers"])
def verifier(request):
    if platform.machine() != "x86_64":
        pytest.skip("the programs use x86-64's system call numbers")
    with CodeVerifier(WORKERS, LIMITS, optional_layers=request.param) as verifier:
        yield verifier


async def _verify(verifier, test, program):
    return await verifier.verify([test], f"```python\n{program}\n```", 60.0)


@pytest.fixture(scope="module")
def verdicts(verifier):
    """Of all programs, side by side as a step has them."""

    async def all_of_them():
        printing = [_verify(verifier, CodeTest("", "right"), program) for program in HOSTILE.values()]
        called = [_verify(verifier, CodeTest("", "7", "f"), program) for program in CALLED.values()]
        return await asyncio.gather(*printing, *called)

    return dict(zip([*HOSTILE, *CALLED], asyncio.run(all_of_them()), strict=True))


@pytest.mark.parametrize("name", [*HOSTILE, *CALLED])
def test_a_hostile_program_scores_zero(verdicts, name):
    assert isinstance(verdicts[name], Scored)
    assert verdicts[name].value == 0.0


def test_after_hostile_programs_right_ones_score_one(verifier, verdicts):
    async def right_ones():
        return await asyncio.gather(*(_verify(verifier, CodeTest("", "2"), "print(2)") for _ in range(WORKERS)))

    assert [verdict.value for verdict in asyncio.run(right_ones())] == [1.0] * WORKERS


@pytest.mark.parametrize("optional_layers", [True, False])
def test_no_program_can_read_what_an_earlier_one_was_or_wrote(optional_layers):
    with CodeVerifier(1, Limits(cpu_s=30, wall_s=60.0), optional_layers) as verifier:
        for _ in range(3):
            earlier = f"print({EARLIER!r} * 100, file=sys.stderr)\nprint({EARLIER!r} * 1000)"
            verdict = asyncio.run(_verify(verifier, CodeTest(f"{EARLIER}-input", "right"), earlier))
            assert EARLIER in verdict.evidence
        verdict = asyncio.run(_verify(verifier, CodeTest(EARLIER[:9], "searched"), READ_MEMORY))
    assert (verdict.value, verdict.evidence) == (1.0, "1 tests passed")
