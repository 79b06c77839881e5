"""What a supervised command leaves behind, however it ends: nothing."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from exprl_megatron.processes.supervise import supervised_command

# As SGLang does: a child has a file in shared memory mapped, and is killed without a chance to remove it.
MAPS = """
import mmap, os, subprocess, sys, time
if len(sys.argv) == 2:
    child = subprocess.Popen([sys.executable, "-S", sys.argv[0], sys.argv[1], "child"])
    child.wait()
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
    print("mapped", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def shared():
    path = Path("/dev/shm") / f"sglang_loads_exprl_test_{uuid.uuid4().hex}.shm"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "maps.py"
    path.write_text(MAPS)
    return path


@pytest.mark.parametrize("how", ["its supervisor is asked to stop", "it is killed itself", "its parent is gone"])
def test_nothing_is_left_in_shared_memory(shared, program, how):
    command = [sys.executable, "-S", str(program), str(shared)]
    if how == "its parent is gone":
        starter = (
            "import subprocess, sys; from exprl_megatron.processes.supervise import supervised_command; "
            "subprocess.Popen(supervised_command(sys.argv[1:])).wait()"
        )
        parent = subprocess.Popen([sys.executable, "-c", starter, *command], stdout=subprocess.PIPE, text=True)
    else:
        parent = subprocess.Popen(supervised_command(command), stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "mapped\n"
    assert shared.exists()
    if how == "it is killed itself":
        time.sleep(6.0)  # longer than between two looks
        (server,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(server), signal.SIGKILL)
    elif how == "its parent is gone":
        parent.kill()
    else:
        parent.terminate()
    parent.wait(30)
    deadline = time.monotonic() + 20
    while shared.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not shared.exists()


def test_what_others_have_in_shared_memory_is_left_alone(program, shared):
    other = shared.with_name(f"{shared.name}.other")
    other.write_bytes(b"of another server")
    parent = subprocess.Popen(
        supervised_command([sys.executable, "-S", str(program), str(shared)]), stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "mapped\n"
    parent.terminate()
    parent.wait(30)
    assert other.exists()
    other.unlink()
