"""Closes all that it could be watched by, and never ends."""

import os
import time

os.closerange(0, 1024)
while True:
    time.sleep(0.01)
