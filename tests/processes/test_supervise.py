"""What a supervised command leaves behind, however it ends: nothing."""

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from helpers.processes import running, wait_until

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


def wait_for_polls(supervisor: int, count: int) -> None:
    """Wait until the supervisor has slept `count` times: on a loaded machine it looks later than by the clock."""

    def sleeps() -> int:
        status = Path(f"/proc/{supervisor}/status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", status, re.MULTILINE)[1])

    before = sleeps()
    wait_until(lambda: sleeps() >= before + count, 300)


@pytest.mark.slow
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
        wait_for_polls(parent.pid, 30)  # more than between two looks
        (server,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(server), signal.SIGKILL)
    elif how == "its parent is gone":
        parent.kill()
    else:
        parent.terminate()
    parent.wait(120)
    wait_until(lambda: not shared.exists(), 120)


def test_what_others_have_in_shared_memory_is_left_alone(program, shared):
    other = shared.with_name(f"{shared.name}.other")
    other.write_bytes(b"of another server")
    parent = subprocess.Popen(
        supervised_command([sys.executable, "-S", str(program), str(shared)]), stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "mapped\n"
    parent.terminate()
    parent.wait(120)
    assert other.exists()
    other.unlink()


def test_the_temporary_directory_of_a_command_is_removed_at_its_end():
    program = "import os; print(os.environ['TMPDIR'], os.path.isdir(os.environ['TMPDIR']))"
    done = subprocess.run(supervised_command([sys.executable, "-c", program]), stdout=subprocess.PIPE, text=True)
    directory, existed = done.stdout.split()
    assert existed == "True" and not Path(directory).exists()


def test_slurm_s_signal_ahead_of_a_time_limit_ends_neither_the_supervisor_nor_its_command():
    program = "import os; print(os.getpid(), flush=True); input(); print('done')"
    command = supervised_command([sys.executable, "-c", program])
    supervisor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    server = int(supervisor.stdout.readline())
    for pid in (supervisor.pid, server):
        os.kill(pid, signal.SIGUSR1)
    assert supervisor.communicate("\n", timeout=300)[0] == "done\n" and supervisor.returncode == 0


def test_children_that_a_command_leaves_behind_are_killed_with_its_group():
    leave = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL).pid)"
    done = subprocess.run(supervised_command([sys.executable, "-c", leave]), stdout=subprocess.PIPE, text=True)
    wait_until(lambda: not running(int(done.stdout)), 60)
