"""Imported by the fork server of the tests; remembers in which process."""

import os

PID = os.getpid()
