"""Programs that attack the machine: none has an effect, with every layer of containment and with the needed alone."""

import asyncio
import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.processes import left_behind

from exprl_megatron.judging.judgement import Scored
from exprl_megatron.problems.problem import CodeTest
from exprl_megatron.processes.descendants import existing
from exprl_megatron.rewards.code_answer import CodeVerifier
from exprl_megatron.rewards.code_sandbox import CodeSandbox
from exprl_megatron.rewards.code_watch import CONTAINED, Watch
from exprl_megatron.rewards.containment import Limits

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the programs use x86-64's system call numbers")

PROGRAMS = Path(__file__).parent / "hostile"
LIMITS = Limits(cpu_s=10, memory_bytes=2**29, output_bytes=2**20, threads=8)
MODULES = ("fcntl", "socket", "subprocess", "multiprocessing", "multiprocessing.popen_fork", "mmap", "pathlib",
           "shutil", "tempfile", "encodings.idna")  # fmt: skip
SECRET = "jackdaws-love-my-big-sphinx"
PR_SET_CHILD_SUBREAPER = 36

OVERRUNNING = {
    "endless_loop": "time",
    "closes_and_loops": "time",
    "sleep_forever": "time",
    "ignore_signals": "time",
    "endless_output": "output",
    "endless_errors": "output",
}
WITHOUT_SUCCESS = {
    "fork_bomb": "0",
    "daemon": "no process",
    "disk_filler": "",
    "write_outside": "",
    "delete_files": "",
    "read_outside": "",
    "links": "",
    "network": "",
    "kill_parent": "",
    "kill_all": "",
    "escalate": "[]",
    "inherited_files": "[3]",  # where the value of a call is written
}
WITHIN_LIMITS = {"memory_bomb": 512, "threads": 8}


class World:
    """What the programs may not touch: files, a server, processes."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.file = directory / "secret.txt"
        self.file.write_text(SECRET)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(self.tcp.getsockname())
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(str(directory / "socket"))
        self.local.listen()
        for server in (self.tcp, self.udp, self.local):
            server.setblocking(False)
        self.victim = psutil.Popen(["sleep", "600"], start_new_session=True)
        self.signals: list[int] = []
        self.before = self._state()

    def told(self) -> dict:
        """What a program needs to know to attack all this."""
        return {
            "file": str(self.file),
            "directory": str(self.directory),
            "link": str(self.directory / "link"),
            "name": f"filler-{os.getpid()}",
            "local": str(self.directory / "socket"),
            "port": self.tcp.getsockname()[1],
            "pid": self.victim.pid,
        }

    def changes(self) -> list[str]:
        """What is not as it was."""
        found = [name for name, value in self._state().items() if self.before[name] != value]
        return found + [f"signal {number}" for number in self.signals]

    def close(self) -> None:
        for server in (self.tcp, self.udp, self.local):
            server.close()
        self.victim.kill()
        self.victim.wait()

    def _state(self) -> dict[str, object]:
        file = self.file.stat() if self.file.exists() else None
        return {
            "content": self.file.read_text() if file else None,
            "file": file and (file.st_mode, file.st_uid, file.st_mtime_ns, file.st_ctime_ns, file.st_nlink),
            "directory": sorted(self.directory.iterdir()) if self.directory.exists() else None,
            "fillers": [p for d in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/") for p in Path(d).glob("filler-*")],
            "tcp": _heard(self.tcp.accept),
            "udp": _heard(lambda: self.udp.recv(1)),
            "local": _heard(self.local.accept),
            "victim": (self.victim.is_running(), self.victim.status() != psutil.STATUS_ZOMBIE),
            "victim's limits": [self.victim.rlimit(limit) for limit in (psutil.RLIMIT_CPU, psutil.RLIMIT_NOFILE)],
            "victim's scheduling": (self.victim.nice(), self.victim.cpu_affinity()),
            "processes": sorted(process.pid for process in psutil.Process().children(recursive=True)),
        }


def _heard(listen) -> bool:
    try:
        listen()
        return True
    except BlockingIOError:
        return False


@pytest.fixture(scope="module", params=[True, False], ids=["every layer", "needed layers"])
def sandbox(request, tmp_path_factory):
    inherited = (tmp_path_factory.mktemp("inherited") / "file").open("w")
    os.set_inheritable(inherited.fileno(), True)
    sandbox = CodeSandbox(LIMITS, MODULES, optional_layers=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPRL_TEST_SECRET", SECRET)
        sandbox.layers()
    yield sandbox
    sandbox.close()
    inherited.close()


@pytest.fixture
def world(sandbox, tmp_path):
    """Everything here as it should be; orphans of a contained process would become children of this one."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    world = World(tmp_path)
    former = signal.signal(signal.SIGURG, lambda number, _: world.signals.append(number))
    yield world
    signal.signal(signal.SIGURG, former)
    world.close()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _attack(sandbox, world, name, wall_s=60.0):
    outcome = sandbox.run((PROGRAMS / f"{name}.py").read_text(), json.dumps(world.told()), None, wall_s)
    assert world.changes() == []
    assert SECRET not in outcome.output + outcome.error
    assert sandbox.run("print(int(input()) + 1)", "1", None, 60.0).output == "2\n"
    return outcome


@pytest.mark.parametrize(("name", "ending"), OVERRUNNING.items())
def test_a_program_without_end_is_ended(sandbox, world, name, ending):
    wall_s = 0.7 if ending == "time" else 60.0
    assert _attack(sandbox, world, name, wall_s).ending == ending


@pytest.mark.parametrize(("name", "output"), WITHOUT_SUCCESS.items())
def test_an_attack_has_no_success(sandbox, world, name, output):
    outcome = _attack(sandbox, world, name)
    assert (outcome.ending, outcome.output.strip(), outcome.error) == ("finished", output, "")


@pytest.mark.parametrize(("name", "most"), WITHIN_LIMITS.items())
def test_a_greedy_program_gets_no_more_than_its_limit(sandbox, world, name, most):
    outcome = _attack(sandbox, world, name)
    assert outcome.ending == "finished"
    assert 0 < int(outcome.output) <= most


def test_neither_environments_nor_memory_of_others_can_be_read(sandbox, world):
    outcome = _attack(sandbox, world, "read_environment")
    environment, *further = outcome.output.splitlines()
    assert further == []
    assert "HOME" not in environment
    assert outcome.ending == "finished"


def test_the_processor_limit_ends_a_program_that_ignores_signals():
    sandbox = CodeSandbox(Limits(cpu_s=1))
    try:
        assert sandbox.run((PROGRAMS / "ignore_signals.py").read_text(), "", None, 600.0).ending == "time"
    finally:
        sandbox.close()


@pytest.mark.parametrize(("used_s", "ending"), [(1.0, "time"), (0.89, "time"), (0.6, "time"), (0.4, None)])
def test_a_program_that_the_kernel_kills_at_its_limit_may_have_used_less(monkeypatch, used_s, ending):
    """The kernel counts whole ticks: with a limit of 1 s it killed some at 0.898 s."""
    control, other = socket.socketpair()
    with control, other:
        watch = Watch(0, None, control, [100, 101, 102], 0.0, Limits(cpu_s=1))
        watch._open, watch._message = set(), CONTAINED
        monkeypatch.setattr(watch, "_wait", lambda: (signal.SIGKILL, used_s))
        reply = watch.reply(of_call=False)
    assert reply.get("ending") == ending and ("failure" in reply) == (ending is None)


def test_a_verdict_can_neither_be_found_nor_forged():
    begins = "correct-horse"
    test = CodeTest(json.dumps({"begins": begins}), f"{begins}-battery-staple")
    text = f"```python\n{(PROGRAMS / 'forge.py').read_text()}\n```"
    with CodeVerifier() as verifier:
        for tests in ([test], [CodeTest("", "", None), test]):
            verdict = asyncio.run(verifier.verify(tests, text, 60.0))
            assert isinstance(verdict, Scored)
            assert verdict.value == 0.0
        assert "staple" not in asyncio.run(verifier.verify([test], text, 60.0)).evidence.partition("got")[2]


@pytest.mark.parametrize("name", ["write_outside", "delete_files", "read_outside", "links", "network"])
def test_not_contained_the_same_programs_do_harm(sandbox, world, name):
    command = [sys.executable, str(PROGRAMS / f"{name}.py")]
    run = subprocess.run(
        command, input=json.dumps(world.told()), capture_output=True, text=True, check=False, timeout=300
    )
    assert world.changes() or SECRET in run.stdout


def test_an_endless_program_whose_trainer_was_killed_ends_too(tmp_path):
    code = (
        "import os, signal, threading, time\n"
        "from exprl_megatron.processes.descendants import descendants\n"
        "from exprl_megatron.rewards.code_sandbox import CodeSandbox\n"
        "sandbox = CodeSandbox()\n"
        "sandbox.layers()\n"
        "def die():\n"
        "    while len(pids := list(descendants(os.getpid()))) < 3:  # worker, zygote, program\n"
        "        time.sleep(0.01)\n"
        "    print(*pids, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=die).start()\n"
        "sandbox.run('while True: pass', '', None, 600.0)\n"
    )
    trainer = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert trainer.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in trainer.stdout.split()]
    assert len(pids) == 3
    left = left_behind(existing(pids))
    for process in left:
        process.kill()
    assert left == []
