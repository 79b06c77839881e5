"""Never ends, whatever signal asks it to."""

import resource
import signal

for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        continue
for limits in ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), (10**6, 10**6)):
    try:
        resource.setrlimit(resource.RLIMIT_CPU, limits)
    except (OSError, ValueError):
        continue
while True:
    pass
