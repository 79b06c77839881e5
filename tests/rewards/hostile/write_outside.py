"""Writes to a file, and makes new ones beside it, by name, by directory and by raw system calls."""

import ctypes
import json
import os

told = json.loads(input())
libc = ctypes.CDLL(None)
name = told["file"].encode()
OPENAT, OPENAT2, CREAT, AT_FDCWD = 257, 437, 85, -100
for mode in ("w", "a", "r+"):
    try:
        with open(told["file"], mode) as file:
            file.write("spoiled")
    except OSError:
        continue
how = (ctypes.c_uint64 * 3)(os.O_WRONLY | os.O_TRUNC, 0, 0)
for opened in (
    libc.open(name, os.O_WRONLY | os.O_TRUNC),
    libc.syscall(OPENAT, AT_FDCWD, name, os.O_WRONLY | os.O_TRUNC, 0),
    libc.syscall(OPENAT2, AT_FDCWD, name, how, 24),
    libc.syscall(CREAT, name + b".new", 0o600),
):
    if opened >= 0:
        libc.write(opened, b"spoiled", 7)
for change in (
    lambda: os.mkdir(told["file"] + ".directory"),
    lambda: os.mkfifo(told["file"] + ".pipe"),
    lambda: os.mknod(told["file"] + ".node"),
    lambda: os.link(told["file"], told["file"] + ".link"),
):
    try:
        change()
    except OSError:
        continue
