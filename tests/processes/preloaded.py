"""Imported by the fork server of the tests; remembers in which process, and has asked for the temporary directory."""

import os
import tempfile

PID = os.getpid()
TEMPORARY = tempfile.gettempdir()
