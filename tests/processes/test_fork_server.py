"""Processes forked from a fork server are to the launcher, and to themselves, what started ones are."""

import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from helpers.processes import family, left_behind, running

from exprl_megatron.processes.child import ForkedChild
from exprl_megatron.processes.fork_server import ForkRequest, ForkServer
from exprl_megatron.processes.starter import Starter
from exprl_megatron.processes.supervise import HEARTBEAT

PR_GET_CHILD_SUBREAPER = 37
HERE = Path(__file__).parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENVIRONMENT["PYTHONPATH"] = f"{HERE}{os.pathsep}{HERE.parent}"


@pytest.fixture(params=["forked", "executed"])
def starter(request):
    """Both ways to start a process; they must not differ."""
    environment = ENVIRONMENT | {"SERVERS": "1"}
    servers = [ForkServer("preloaded", {"forked_program"}, environment, 60)] if request.param == "forked" else []
    with Starter(servers) as starter:
        yield starter


def start(starter, log, what, *arguments, **settings):
    command = [sys.executable, "-m", "forked_program", what, *arguments]
    with open(log, "wb") as output:
        environment = ENVIRONMENT | {"MARK": "1", "PYTHONUNBUFFERED": "1"}
        return starter.start("program-0", command, environment, output, output, **settings)


def eventually(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def words(pid):
    """The words of its command; what follows a title is empty."""
    return " ".join(psutil.Process(pid).cmdline()).split()


def ready(log):
    """The process of the program, once it is ready."""
    return int(eventually(lambda: log.exists() and log.read_text().partition("ready ")[2].split())[0])


def adopts():
    """Whether this process becomes the parent of its descendants' orphans."""
    found = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0) == 0
    return bool(found.value)


def test_a_process_has_its_arguments_environment_descriptors_and_end(starter, tmp_path):
    log = tmp_path / "log"
    read, write = os.pipe()
    child = start(starter, log, "report", "a", "b c", inherited={HEARTBEAT: write})
    os.close(write)
    assert psutil.Process(child.pid).ppid() == os.getpid()
    assert child.wait() == 0 and child.poll() == 0
    with os.fdopen(read) as file:
        assert file.read() == "through the descriptor"
    forked = isinstance(child, ForkedChild)
    assert log.read_text().splitlines() == [
        "argv report a b c main forked_program",
        f"mark 1 path True server's None preloaded in {forked}",
        f"session True parent {child.pid}",
        "collects True own temporary True unbuffered True",
        "at the end",
    ]
    assert not adopts()


def test_a_process_has_the_umask_of_its_start_and_not_that_of_the_fork_server(starter, tmp_path):
    # The fork server imports before a run claims its directory, which makes the run's files private.
    before = os.umask(0o077)
    try:
        child = start(starter, tmp_path / "log", "write", str(tmp_path / "made"))
    finally:
        os.umask(before)
    assert child.wait(60) == 0
    modes = [stat.S_IMODE((tmp_path / "made" / name).stat().st_mode) for name in ("", "file")]
    assert modes == [0o700, 0o600]


@pytest.mark.parametrize(("what", "words"), [("fail", "ValueError: as it should"), ("exit", "a sentence")])
def test_a_failure_is_in_the_log_and_the_status(starter, tmp_path, what, words):
    child = start(starter, tmp_path / "log", what)
    assert child.wait(60) == 1
    assert (tmp_path / "log").read_text().splitlines()[-1] == words


def test_a_process_is_waited_for_no_longer_than_the_timeout(starter, tmp_path):
    child = start(starter, tmp_path / "log", "wait")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.1)
    child.kill()
    child.wait()


def test_sigterm_to_the_supervisor_gives_the_program_time_to_end(starter, tmp_path):
    child = start(starter, tmp_path / "log", "wait", grace_s=60)
    ready(tmp_path / "log")
    child.terminate()
    assert child.wait(60) == 7


def test_a_program_without_a_handler_ends_by_sigterm(starter, tmp_path):
    child = start(starter, tmp_path / "log", "idle", grace_s=5)
    ready(tmp_path / "log")
    child.terminate()
    assert child.wait(60) == 128 + signal.SIGTERM


def test_a_program_that_is_killed_is_reported_with_its_signal(starter, tmp_path):
    child = start(starter, tmp_path / "log", "wait")
    os.kill(ready(tmp_path / "log"), signal.SIGKILL)
    assert child.wait(60) == 128 + signal.SIGKILL


def test_a_program_ends_with_its_supervisor(starter, tmp_path):
    child = start(starter, tmp_path / "log", "wait")
    program = ready(tmp_path / "log")
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
    eventually(lambda: not running(program))


def test_the_list_of_processes_shows_the_command(starter, tmp_path):
    child = start(starter, tmp_path / "log", "wait")
    assert words(ready(tmp_path / "log"))[1:4] == ["-m", "forked_program", "wait"]
    assert "supervise.py" in words(child.pid)[3]
    child.kill()
    child.wait()


@pytest.mark.parametrize("supervised", [True, False])
def test_kill_9_of_the_launcher_ends_all(tmp_path, supervised):
    program = f"""
from test_fork_server import *
starter = Starter([ForkServer("preloaded", {{"forked_program"}}, ENVIRONMENT, 60)])
start(starter, {str(tmp_path / "log")!r}, "wait", grace_s={5.0 if supervised else None})
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], env=ENVIRONMENT)
    ready(tmp_path / "log")
    started = family(launcher.pid)
    # The fork server, the program, and its supervisor.
    assert len(started) == 2 + supervised
    launcher.kill()
    launcher.wait()
    assert not left_behind(started)


def test_where_the_libraries_cannot_be_imported_processes_are_started_and_it_is_said_once(tmp_path, capfd):
    with Starter([ForkServer("no_such_module", {"forked_program"}, ENVIRONMENT, 60)]) as starter:
        children = [start(starter, tmp_path / f"{i}", "fail") for i in range(2)]
        assert [child.wait() for child in children] == [1, 1]
    (line,) = capfd.readouterr().err.splitlines()
    assert "fork server of forked_program failed" in line and "No module named 'no_such_module'" in line


def test_a_fork_server_that_dies_is_replaced_by_starting(tmp_path, capfd):
    others = set(psutil.Process().children())
    server = ForkServer("preloaded", {"forked_program"}, ENVIRONMENT, 60)
    with Starter([server]) as starter:
        first = start(starter, tmp_path / "first", "wait")
        ready(tmp_path / "first")
        started = set(psutil.Process().children()) - others
        (process,) = (p for p in started if "exprl_megatron.processes.fork_process" in p.cmdline())
        process.kill()
        assert start(starter, tmp_path / "second", "fail").wait() == 1
        assert first.poll() is None
        first.kill()
        first.wait()
    assert "fork server of forked_program failed" in capfd.readouterr().err


def test_the_end_of_the_fork_server_leaves_what_it_has_forked(tmp_path):
    with Starter([ForkServer("preloaded", {"forked_program"}, ENVIRONMENT, 60)]) as starter:
        child = start(starter, tmp_path / "log", "wait")
        ready(tmp_path / "log")
    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_fork_server_that_ends_before_it_answers_is_given_up_with_a_sentence(capfd):
    server = object.__new__(ForkServer)
    server.programs, server._log = frozenset({"forked_program"}), tempfile.TemporaryFile()  # noqa: SIM115
    server._channel, other = socket.socketpair()
    server._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    other.shutdown(socket.SHUT_WR)
    request = ForkRequest([sys.executable, "-m", "forked_program", "fail"], {}, None, "program-0")
    with other:
        assert server.start(request, [1, 2]) is None
        assert server.start(request, [1, 2]) is None
    assert not adopts()
    server.close()
    assert capfd.readouterr().err == "exprl: the fork server of forked_program failed (it ended).\n"
