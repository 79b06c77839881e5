"""Blocks that are freed stay with the process, unless the environment says otherwise."""

import subprocess
import sys

IN_A_NEW_PROCESS = """
from exprl_megatron.utils.freed_memory import keep_freed_memory

print(keep_freed_memory())
"""
FAULTS = """
import resource
import torch

for count in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**22)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def in_a_new_process(monkeypatch, program: str, **variables: str) -> list[str]:
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()


def test_a_freed_block_is_used_again_without_new_pages(monkeypatch):
    kept, faults = in_a_new_process(monkeypatch, IN_A_NEW_PROCESS + FAULTS)
    # 20 blocks of 16 MiB have 81,920 pages of 4 KiB; where memory is short, the kernel takes some of another kind away.
    assert kept == "True" and int(faults) < 4096


def test_settings_of_malloc_in_the_environment_take_precedence(monkeypatch):
    assert in_a_new_process(monkeypatch, IN_A_NEW_PROCESS, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
