"""Garbage collection: Python searches all objects for reference cycles only between two steps."""

import gc

NEVER = 2**31 - 1


def collect_between_steps() -> None:
    """Exclude all present objects from collections, and make full collections only in collect().

    A full collection stops every thread for as long as it takes to look at each object: with 2,048 requests in flight
    the event loop would stop for a fifth of a second, in the middle of a step. Collections of young objects continue as
    usual.
    """
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)
    gc.enable()


def collect() -> None:
    """Make a full collection; does nothing in a process that did not call collect_between_steps."""
    if gc.get_threshold()[2] == NEVER:
        gc.collect()
