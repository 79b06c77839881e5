"""Starts processes in every way that there is; each would stay for a minute."""

import ctypes
import multiprocessing
import os
import subprocess
import time

libc = ctypes.CDLL(None)
CLONE, CLONE3, VFORK, SIGCHLD = 56, 435, 58, 17


def clone():
    return libc.syscall(CLONE, SIGCHLD, 0, 0, 0, 0)


def clone3():
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, SIGCHLD)
    return libc.syscall(CLONE3, arguments, ctypes.sizeof(arguments))


started = 0
for _ in range(20):
    for fork in (os.fork, os.forkpty, libc.fork, clone, clone3):
        try:
            pid = fork()
        except OSError:
            continue
        if pid == 0 or (isinstance(pid, tuple) and pid[0] == 0):
            time.sleep(60)
        started += not (isinstance(pid, int) and pid < 0)
for start in (
    lambda: multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start(),
    lambda: subprocess.Popen(["/bin/sleep", "60"]),
    lambda: os.posix_spawn("/bin/sleep", ["sleep", "60"], {}),
    lambda: os.execv("/bin/sleep", ["sleep", "60"]),
):
    try:
        start()
        started += 1
    except OSError:
        continue
print(started)
