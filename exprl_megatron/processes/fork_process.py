"""`python -m exprl_megatron.processes.fork_process CHANNEL PARENT MODULE` imports MODULE and forks the programs that
PARENT requests.

It computes nothing and has one thread, so that what it forks begins as a new process would, with its libraries. Each
is forked twice: the process between ends, and the launcher adopts what it leaves.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from typing import NoReturn

from setproctitle import getproctitle, setproctitle

from exprl_megatron.processes.child import ForkedChild, die_with_parent
from exprl_megatron.processes.fork_server import LENGTH_BYTES, ForkRequest
from exprl_megatron.processes.supervise import shell_status, supervise, supervised_command

_MOST_DESCRIPTORS = 8


def main(channel: int, parent: int, module: str) -> None:
    """Serve until the launcher is gone, or has closed its end of the channel."""
    die_with_parent(parent)
    # Slurm's signal ahead of a time limit and Ctrl-C are for the launcher.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # It finds the memory for titles here; it could not do so in another environment.
    getproctitle()
    # What is imported stays: it is not looked through, here or in what is forked, and its pages remain shared.
    gc.disable()
    importlib.import_module(module)
    gc.freeze()
    with socket.socket(fileno=channel) as requests:
        while (received := _receive(requests)) is not None:
            request, descriptors = received
            pid = _fork_twice(request, descriptors, parent, requests)
            for descriptor in descriptors:
                os.close(descriptor)
            requests.sendall(pid.to_bytes(LENGTH_BYTES))


def _receive(requests: socket.socket) -> tuple[ForkRequest, list[int]] | None:
    """Return the next request and its descriptors; None at the end."""
    length, descriptors, _, _ = socket.recv_fds(requests, LENGTH_BYTES, _MOST_DESCRIPTORS)
    if len(length) < LENGTH_BYTES:
        return None
    body = requests.recv(int.from_bytes(length), socket.MSG_WAITALL)
    return ForkRequest(**json.loads(body)), descriptors


def _fork_twice(request: ForkRequest, descriptors: list[int], parent: int, requests: socket.socket) -> int:
    """Return the process that was forked, once `parent` has adopted it."""
    report, reported = os.pipe()
    between = os.fork()
    if between:
        os.close(reported)
        pid = int.from_bytes(os.read(report, LENGTH_BYTES))
        os.close(report)
        os.waitpid(between, 0)
        return pid
    between = os.getpid()
    if pid := os.fork():
        os.write(reported, pid.to_bytes(LENGTH_BYTES))
        os._exit(0)
    try:
        for descriptor in (report, reported):
            os.close(descriptor)
        requests.close()
        while os.getppid() == between:
            time.sleep(0.001)
        _become(request, descriptors, parent)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _become(request: ForkRequest, descriptors: list[int], parent: int) -> NoReturn:
    """Run the requested program, under a supervisor where it has one; does not return."""
    standard, inherited = descriptors[:2], descriptors[2:]
    for number, descriptor in zip((1, 2), standard, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.umask(request.umask)
    os.environ.clear()
    os.environ.update(request.environment)
    os.environ.update({name: str(fd) for name, fd in zip(request.inherited, inherited, strict=True)})
    if request.grace_s is None:
        die_with_parent(parent)
        _run(request)
    setproctitle(_title(supervised_command(request.command, request.grace_s, parent), request))
    supervisor = os.getpid()

    def start(environment: dict[str, str]) -> ForkedChild:
        waiting, started = os.pipe()
        if pid := os.fork():
            os.close(started)
            # It can be ended, with its group, as soon as this returns.
            os.read(waiting, 1)
            os.close(waiting)
            return ForkedChild(pid)
        os.setsid()
        die_with_parent(supervisor)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor in (waiting, started):
            os.close(descriptor)
        os.environ.update(environment)
        _run(request)

    # Exit handlers of the fork server's modules must not run here.
    os._exit(shell_status(supervise(parent, request.grace_s, start)))


def _run(request: ForkRequest) -> NoReturn:
    """Run the program in this process, as `python -m` does, and end; does not return."""
    _, _, module, *arguments = request.command
    setproctitle(_title(request.command, request))
    # An unbuffered or line-buffered stream was one before it was this process's.
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=unbuffered or os.isatty(1), write_through=unbuffered)
    tempfile.tempdir = None
    sys.argv = ["", *arguments]
    gc.enable()
    status: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # The steps of an interpreter's end that matter: threads, what was registered for the end, buffers.
    threading._shutdown()
    atexit._run_exitfuncs()
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _title(command: list[str], request: ForkRequest) -> str:
    return f"{' '.join(command)} ({request.name})"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
