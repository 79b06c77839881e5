"""Leaves a process behind that has its own session and outlives everyone."""

import os
import signal
import time

signal.signal(signal.SIGHUP, signal.SIG_IGN)
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
except OSError:
    print("no process")
