"""Counts what Python executes, so that a test can say how a cost grows without a clock."""

import sys
from collections.abc import Callable

_TOOL = sys.monitoring.PROFILER_ID


def instructions(call: Callable[[], object]) -> int:
    """How many bytecode instructions `call()` executes; what C functions do on their own is not counted."""
    executed = 0

    def count(*_) -> None:
        nonlocal executed
        executed += 1

    sys.monitoring.use_tool_id(_TOOL, "instructions")
    try:
        sys.monitoring.register_callback(_TOOL, sys.monitoring.events.INSTRUCTION, count)
        sys.monitoring.set_events(_TOOL, sys.monitoring.events.INSTRUCTION)
        call()
    finally:
        sys.monitoring.set_events(_TOOL, 0)
        sys.monitoring.free_tool_id(_TOOL)
    return executed
