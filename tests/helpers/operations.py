"""Counts what Python executes, so that a test can say how a cost grows without a clock.

Only the calling thread is counted, and the garbage collector is off meanwhile: it runs at any allocation,
and with it the callbacks that libraries registered in `gc.callbacks` (Hypothesis has one). What is to be counted is
called once before, since a first call may import, compile and fill caches, and whether it does depends on other tests.
"""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TOOL = sys.monitoring.PROFILER_ID


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def python_calls(call: Callable[[], object]) -> int:
    """Return how many Python functions `call()` calls, itself included."""
    counted = 0

    def count(frame, event, argument) -> None:
        nonlocal counted
        counted += event == "call"

    call()
    with _garbage_collector_off():
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
    return counted


def instructions(call: Callable[[], object]) -> int:
    """Return how many bytecode instructions `call()` executes; what C functions do on their own is not counted."""
    executed, thread = 0, threading.get_ident()

    def count(*_) -> None:
        nonlocal executed
        executed += threading.get_ident() == thread

    call()
    sys.monitoring.use_tool_id(_TOOL, "instructions")
    with _garbage_collector_off():
        try:
            sys.monitoring.register_callback(_TOOL, sys.monitoring.events.INSTRUCTION, count)
            sys.monitoring.set_events(_TOOL, sys.monitoring.events.INSTRUCTION)
            call()
        finally:
            sys.monitoring.set_events(_TOOL, 0)
            sys.monitoring.free_tool_id(_TOOL)
    return executed
