"""Blocks that are freed stay with the process, unless the environment says otherwise."""

import subprocess
import sys

import pytest

IN_A_NEW_PROCESS = """
import resource
import torch
from exprl_megatron.utils.freed_memory import keep_freed_memory

print(keep_freed_memory())
for count in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**22)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_a_freed_block_is_used_again_without_new_pages(monkeypatch, variables, kept):
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    said, faults = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
    assert said == str(kept)
    # 20 blocks of 16 MiB have 81,920 pages of 4 KiB.
    assert (int(faults) < 100) == kept
