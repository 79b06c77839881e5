"""When Python looks for reference cycles: through everything only between two steps."""

import gc

NEVER = 2**31 - 1


def collect_between_steps() -> None:
    """Leave out of all collections what exists now, and look through everything else only in collect().

    A full collection stops every thread for as long as it takes to look at each object: with 2,048 requests in flight
    the event loop would stop for a fifth of a second, in the middle of a step. New objects are looked at as usual.
    """
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)
    gc.enable()


def collect() -> None:
    """Look through everything now; does nothing in a process where Python itself decides when."""
    if gc.get_threshold()[2] == NEVER:
        gc.collect()
