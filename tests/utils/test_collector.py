"""Full collections happen between steps alone, once a process has asked for that."""

import subprocess
import sys

IN_A_NEW_PROCESS = """
import gc
from exprl_megatron.utils.collector import collect, collect_between_steps

full = []
gc.callbacks.append(lambda phase, found: full.append(found["generation"]) if phase == "start" else None)


def make(count):
    kept = []
    for _ in range(count):
        cycle = []
        cycle.append(cycle)
        kept.append(cycle)


gc.collect()
full.clear()
collect()
assert full == []
make(1_000_000)
assert 2 in full and 0 in full
collect_between_steps()
full.clear()
make(1_000_000)
assert 2 not in full and 0 in full
collect()
assert full[-1] == 2
"""


def test_only_young_objects_are_looked_at_within_a_step():
    subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], check=True, timeout=300)
