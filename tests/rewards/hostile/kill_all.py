"""Signals everyone at once. SIGURG does no harm to those who do not wait for it."""

import ctypes
import os
import signal

libc = ctypes.CDLL(None)
for attack in (
    lambda: os.kill(-1, signal.SIGURG),
    lambda: os.killpg(0, signal.SIGURG),
    lambda: os.killpg(os.getpgid(os.getppid()), signal.SIGURG),
    lambda: [os.kill(pid, signal.SIGURG) for pid in range(1, 40_000)],
):
    try:
        attack()
        print("attacked")
    except OSError:
        continue
if libc.kill(-1, signal.SIGURG) == 0:
    print("attacked")
