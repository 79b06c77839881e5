"""Counts of operations belong to the code that is counted, whatever else the process does meanwhile."""

import functools
import gc
import threading

import pytest
from helpers.operations import instructions, python_calls


def work():
    return [[index] for index in range(100)]


def on_collection(phase, info):
    return phase, info


@pytest.mark.parametrize("counted", [instructions, python_calls])
def test_garbage_collection_is_not_counted(counted):
    alone = counted(work)
    thresholds = gc.get_threshold()
    gc.callbacks.append(on_collection)
    gc.set_threshold(1)
    try:
        assert counted(work) == alone
        assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(on_collection)


@pytest.mark.parametrize("counted", [instructions, python_calls])
def test_other_threads_are_not_counted(counted):
    alone, stop = counted(work), threading.Event()

    def busy():
        while not stop.is_set():
            work()

    other = threading.Thread(target=busy)
    other.start()
    try:
        assert {counted(work) for _ in range(50)} == {alone}
    finally:
        stop.set()
        other.join()


@pytest.mark.parametrize("counted", [instructions, python_calls])
def test_what_only_the_first_call_does_is_not_counted(counted):
    known = functools.cache(work)
    assert counted(known) == counted(known)
