"""Reads a secret file, and what every machine has, and prints it."""

import ctypes
import json
import os
import pathlib

told = json.loads(input())
libc = ctypes.CDLL(None)
for path in (told["file"], "/etc/shadow", "/etc/passwd", "/proc/version", "/proc/self/cmdline", "/proc/cpuinfo"):
    for read in (lambda path: pathlib.Path(path).read_text(), lambda path: os.open(path, os.O_RDONLY), os.listdir):
        try:
            print("read", read(path))
        except OSError:
            continue
    fd = libc.syscall(257, -100, path.encode(), os.O_RDONLY, 0)
    if fd >= 0:
        print("read", os.read(fd, 1000))
for directory in ("/", os.path.dirname(told["file"]), os.path.expanduser("~"), "."):
    try:
        print("read", os.listdir(directory))
    except OSError:
        continue
