"""Uses no time of the processor, and never ends."""

import time

time.sleep(10**6)
