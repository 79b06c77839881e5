"""The processes below a process are found by the kernel's lists, whichever thread started them."""

import itertools
import os
import subprocess
import sys

import psutil

from exprl_megatron.processes.descendants import child_pids, descendants
from exprl_megatron.processes.heartbeat import states

FAMILY = """
import subprocess, sys, threading
def start():
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    print(child.pid, flush=True)
    child.wait()
threading.Thread(target=start, daemon=True).start()
input()
"""


def test_a_child_of_another_thread_and_its_parent_are_found_while_the_system_clock_is_adjusted(monkeypatch):
    boot, later = psutil.boot_time(), itertools.count()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot - next(later))
    command = [sys.executable, "-S", "-c", FAMILY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert child_pids(parent.pid) == [child] and len(states(parent.pid)) == 1
        top = os.getpid()
        assert [pid for pid in descendants(top) if pid in (parent.pid, child)] == [parent.pid, child]
        psutil.Process(child).kill()
        parent.communicate("\n")
    assert child_pids(parent.pid) == [] and states(parent.pid) == []
