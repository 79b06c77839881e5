"""Ctrl-C and SIGTERM end a command in order, whatever it is doing."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, ctypes, gc, os, signal, sys, threading, time, weakref
from exprl_megatron import cli
from exprl_megatron.processes.interruption import Interrupted

def say():
    print("busy", flush=True)

async def in_thread():
    # The thread works until the task that waits for it is canceled.
    ended = threading.Event()
    try:
        await asyncio.to_thread(lambda: (say(), ended.wait(60)))
    finally:
        ended.set()

async def asleep():
    asyncio.get_running_loop().call_later(0.1, say)
    await asyncio.sleep(60)

def spend(*_):
    # Python code in which the signal's handler runs.
    say()
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass

class Held:
    pass

class Finalized:
    def __del__(self):
        spend()

class Failing:
    def __del__(self):
        raise ValueError("of a finalizer")

def collect():
    def once(*_):
        # Not in a collection that comes while the command ends, too.
        gc.callbacks.clear()
        spend()

    gc.callbacks.append(once)
    gc.collect()

def work():
    try:
        {busy}
    except Exception:
        print("swallowed")
    finally:
        print("cleaning", flush=True)
        # Until the test lets it continue.
        sys.stdin.read()
        print("clean", flush=True)

cli.app = work
cli.main()
"""
BUSY = {
    "sleeping": "say(); time.sleep(60)",
    "in an event loop": "asyncio.run(asleep())",
    "in a callback of an event loop": "asyncio.run(in_thread())",
    "computing": "say(); sum(i for i in range(10 ** 12))",
}
# Code whose exceptions Python reports and drops, and after it a wait.
DROPPING = {
    "in a finalizer": "Finalized(); time.sleep(60)",
    "in a weak reference's callback": "held = Held(); kept = weakref.ref(held, spend); del held; time.sleep(60)",
    "in the garbage collector": "collect(); time.sleep(60)",
    "in a callback from C": "ctypes.CFUNCTYPE(None)(spend)(); time.sleep(60)",
    "in an event loop's task": "asyncio.run(asyncio.wait_for(asyncio.to_thread(Finalized), 60)); time.sleep(60)",
}


PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)


def started(busy: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.format(busy=busy)]
    process = subprocess.Popen(command, text=True, **PIPES, **settings)
    assert process.stdout.readline() == "busy\n"
    return process


def heed(number: int):
    return lambda: signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY)
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_a_command_in_one_sentence_and_a_second_one_does_not_cut_its_end_short(busy, number, name):
    process = started(busy, preexec_fn=heed(signal.SIGINT))
    os.kill(process.pid, number)
    assert process.stdout.readline() == "cleaning\n"
    os.kill(process.pid, number)
    os.kill(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (128 + number, "clean\n")
    *again, last = errors.splitlines()
    assert again and set(again) == {"exprl: still ending what was started; this takes half a minute at most."}
    assert last == f"exprl: Stopped by {name}, and so is all that it had started; continue with `exprl`."


@pytest.mark.parametrize("busy", DROPPING.values(), ids=DROPPING)
def test_a_signal_ends_a_command_during_code_that_drops_exceptions(busy):
    process = started(busy)
    os.kill(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (143, "cleaning\nclean\n")
    assert errors == "exprl: Stopped by SIGTERM, and so is all that it had started; continue with `exprl`.\n"


def test_a_request_to_stop_is_not_lost_during_code_that_drops_exceptions():
    busy = DROPPING["in a finalizer"]
    process = started(f"from exprl_megatron.launch.preemption import stop_on_sigusr1; stop_on_sigusr1(); {busy}")
    os.kill(process.pid, signal.SIGUSR1)
    out, errors = process.communicate(timeout=120)
    assert (out, errors) == ("swallowed\ncleaning\nclean\n", "")


def test_other_dropped_exceptions_are_reported_as_ever():
    busy = "ctypes.CFUNCTYPE(None)(spend)(); Failing(); time.sleep(60)"
    process = started(busy)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "ValueError: of a finalizer" in errors and "Interrupted" not in errors


def test_a_signal_that_a_shell_has_set_to_be_ignored_is_ignored():
    process = started("say(); time.sleep(0.5)", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    os.kill(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out, errors) == (0, "cleaning\nclean\n", "")
