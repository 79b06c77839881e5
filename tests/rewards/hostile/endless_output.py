"""Writes for ever."""

import os
import sys

while True:
    os.write(1, b"y" * 4096)
    sys.stderr.write("n" * 4096)
