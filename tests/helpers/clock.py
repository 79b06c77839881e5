"""Deadlines of an event loop that pass when a test says so: a short one passes early on a loaded machine."""

import asyncio

PASSED_S = 20.0
"""More than the deadlines that are to pass, and less than those of the clients of tests (30 s)."""


def pass_time() -> None:
    """From now on the running event loop's clock is `PASSED_S` later."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + PASSED_S
