"""Says on standard error what the user's code is doing where it takes long, such as an import that never ends."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_S = 1.0
"""Seconds until the first line; later ones come after 10 seconds and then once a minute."""
_LATER_S = (9.0, 50.0)


@contextmanager
def says_what_takes_long(what: Callable[[], str]) -> Iterator[None]:
    """Print `what()` again and again as long as the context lasts, from FIRST_S seconds on."""
    ended = threading.Event()

    def say() -> None:
        waits = iter(_LATER_S)
        wait_s = FIRST_S
        while not ended.wait(wait_s):
            print(what(), file=sys.stderr, flush=True)
            wait_s = next(waits, 60.0)

    threading.Thread(target=say, name="long-call", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
