"""Deletes, empties, renames and hides a file."""

import ctypes
import json
import os
import shutil

told = json.loads(input())
path, libc = told["file"], ctypes.CDLL(None)
for change in (
    lambda: os.chmod(path, 0),
    lambda: os.chown(path, 12345, 12345),
    lambda: os.utime(path, (0, 0)),
    lambda: os.truncate(path, 0),
    lambda: os.rename(path, path + ".old"),
    lambda: os.remove(path),
    lambda: os.setxattr(path, "user.spoiled", b"1"),
    lambda: shutil.rmtree(os.path.dirname(path)),
):
    try:
        change()
    except OSError:
        continue
libc.unlink(path.encode())
libc.syscall(263, -100, path.encode(), 0)
