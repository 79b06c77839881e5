"""Ctrl-C and SIGTERM end a command in order, whatever it is doing."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, os, signal, sys, time
from exprl_megatron import cli
from exprl_megatron.interruption import Interrupted

def say():
    print("busy", flush=True)

def waiting():
    say()
    time.sleep(3)

async def asleep():
    asyncio.get_running_loop().call_later(0.1, say)
    await asyncio.sleep(60)

def work():
    try:
        {busy}
    except Exception:
        print("swallowed")
    finally:
        print("cleaning", flush=True)
        time.sleep(1.0)
        print("clean", flush=True)

cli.app = work
cli.main()
"""
BUSY = {
    "sleeping": "say(); time.sleep(60)",
    "in an event loop": "asyncio.run(asleep())",
    "in a callback of an event loop": "asyncio.run(asyncio.to_thread(waiting))",
    "computing": "say(); sum(i for i in range(10 ** 12))",
}


def started(busy: str, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.format(busy=busy)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
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
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "clean\n")
    *again, last = errors.splitlines()
    assert again and set(again) == {"exprl: still ending what was started; this takes half a minute at most."}
    assert last == f"exprl: Stopped by {name}, and so is all that it had started; go on with `exprl`."


def test_a_signal_that_a_shell_has_set_to_be_ignored_is_ignored():
    process = started("say(); time.sleep(1.5)", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    os.kill(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (0, "cleaning\nclean\n", "")
