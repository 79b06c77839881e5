"""Starts threads until that fails, and tells how many it got."""

import threading
import time

threading.stack_size(2**16)
count = 0
try:
    while count < 10_000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
except RuntimeError:
    print(count)
