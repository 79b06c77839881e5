"""Ends its parent and another process of the same user, by signals and by what makes the kernel send them."""

import ctypes
import fcntl
import json
import os
import resource
import signal

told = json.loads(input())
libc = ctypes.CDLL(None)
TKILL, TGKILL, SIGQUEUE, PIDFD_OPEN, PIDFD_SEND, SETPRIORITY, SCHED = 200, 234, 129, 434, 424, 141, 144
F_SETSIG, F_NOTIFY_ASYNC = 10, os.O_NONBLOCK | 0o20000
for pid in (os.getppid(), told["pid"]):
    for attack in (
        lambda pid: os.kill(pid, signal.SIGKILL),
        lambda pid: os.killpg(os.getpgid(pid), signal.SIGKILL),
        lambda pid: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)),
        lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, 1)),
        lambda pid: os.sched_setaffinity(pid, {0}),
        lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
        lambda pid: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL),
    ):
        try:
            attack(pid)
            print("attacked")
        except OSError:
            continue
    # An owner of a pipe gets the signal of its choice whenever the pipe becomes readable.
    for fd in range(4):
        try:
            fcntl.fcntl(fd, fcntl.F_SETOWN, pid)
            fcntl.fcntl(fd, F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(fd, fcntl.F_SETFL, F_NOTIFY_ASYNC)
            os.write(fd, b"now")
        except OSError:
            continue
    fcntl_owner = (ctypes.c_int * 1)(pid)
    libc.ioctl(1, 0x8901, fcntl_owner)
    for number, arguments in (
        (TKILL, (pid, 9)),
        (TGKILL, (pid, pid, 9)),
        (SIGQUEUE, (pid, 9, ctypes.create_string_buffer(128))),
        (SCHED, (pid, 5, (ctypes.c_int * 1)(0))),
    ):
        if libc.syscall(number, *arguments) == 0:
            print("attacked")
