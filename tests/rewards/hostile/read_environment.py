"""Reads the environments and the memory of other processes."""

import ctypes
import json
import os

told = json.loads(input())
libc = ctypes.CDLL(None, use_errno=True)
print(dict(os.environ))
for pid in ("self", os.getppid(), told["pid"], 1):
    for name in ("environ", "mem", "maps", "auxv"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                print("read", file.read(1000))
        except OSError:
            continue
buffer = ctypes.create_string_buffer(64)
piece = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 64)
ATTACH, READV, PIDFD_OPEN, PIDFD_GETFD = 16, 310, 434, 438
for pid in (os.getppid(), told["pid"]):
    # This process was forked, so that the parent has something at the same address.
    if libc.syscall(READV, pid, piece, 1, piece, 1, 0) > 0:
        print("read memory")
    if libc.ptrace(ATTACH, pid, 0, 0) == 0:
        print("read registers")
    if (process := libc.syscall(PIDFD_OPEN, pid, 0)) >= 0:
        print("read status")
        if libc.syscall(PIDFD_GETFD, process, 1, 0) >= 0:
            print("read a file descriptor")
