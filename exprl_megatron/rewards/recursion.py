"""Allows programs to recurse as deep as on contest machines, independent of this Python's limits.

CPython 3.12 counts calls of Python from C (`functools.cache`, `sorted` with a key, `__getitem__`) against a separate
limit, which early releases set to 1,500, so that a cached function stops at depth 500. No function changes this limit.
It is an integer in the thread's state; it is recognized here by the values next to it, and left unchanged where these
are not as expected. The stack is made large enough for the new limit.
"""

import ctypes
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

RECURSION_LIMIT = 50_000
"""LiveCodeBench's limit for calls of Python from Python."""
MAIN_STACK_BYTES = 100 * 2**20
"""Below the 128 MiB that Linux leaves free under the stack of every process."""
_BYTES_PER_CALL = 1000
"""Bytes of the C stack for a call through `functools.cache`, `map` etc.; later CPythons allow 10,000 on 8 MiB."""
_DEFAULT_THREAD_BYTES = 8 * 2**20

# PyThreadState of CPython 3.12: three pointers, a status word, then these; checked before use.
_LIMIT_OFFSET, _REMAINING_OFFSET = 32, 36
_MAX_EXPECTED = 20_000


def enlarge_stack() -> None:
    """Allow this process's main thread a large stack.

    Raises:
        OSError: the kernel refuses it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY:
        allowed = MAIN_STACK_BYTES if hard == resource.RLIM_INFINITY else min(MAIN_STACK_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (max(soft, allowed), hard))


def allow_deep_recursion() -> None:
    """Raise both limits of the calling thread (the main one) and of every thread that `threading` starts from it."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    _allow_calls_from_c(MAIN_STACK_BYTES if soft == resource.RLIM_INFINITY else min(soft, MAIN_STACK_BYTES))
    start = threading._start_new_thread

    def start_deep(function: Callable, arguments: tuple, *further: Any) -> int:
        # Reading the size also resets it.
        size = threading.stack_size()
        threading.stack_size(size)

        def deep(*own: Any, **named: Any) -> Any:
            _allow_calls_from_c(size or _DEFAULT_THREAD_BYTES)
            return function(*own, **named)

        return start(deep, arguments, *further)

    threading._start_new_thread = start_deep


def _allow_calls_from_c(stack_bytes: int) -> None:
    """Allow this thread as many calls of Python from C as its stack has room for; does nothing for an unknown state."""
    if sys.version_info[:2] != (3, 12):
        return
    current = ctypes.pythonapi.PyThreadState_Get
    current.restype = ctypes.c_void_p
    state = current()
    limit = ctypes.c_int32.from_address(state + _LIMIT_OFFSET)
    remaining = ctypes.c_int32.from_address(state + _REMAINING_OFFSET)
    allowed = stack_bytes // _BYTES_PER_CALL
    if limit.value == sys.getrecursionlimit() and 0 < remaining.value < min(allowed, _MAX_EXPECTED):
        remaining.value = allowed
