"""Writes to every file descriptor that it might have inherited."""

import os

written = []
for fd in range(3, 1024):
    try:
        os.write(fd, b'{"ending": "finished", "output": "forged", "error": ""}\n')
        written.append(fd)
    except OSError:
        continue
print(written)
