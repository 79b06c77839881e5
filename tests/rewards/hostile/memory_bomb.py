"""Takes all memory that it can get, in every form, and tells how many MiB."""

import ctypes
import mmap
import resource

MIB = 2**20
libc = ctypes.CDLL(None)
held, total = [], 0
for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
    try:
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        continue
for take in (lambda: bytearray(b"x") * (16 * MIB), lambda: mmap.mmap(-1, 16 * MIB)):
    while total < 2**14:
        try:
            held.append(take())
        except (MemoryError, OSError):
            break
        total += 16
memory_file = libc.syscall(319, b"held", 0)
if memory_file >= 0 and libc.ftruncate(memory_file, 64 * MIB) == 0:
    total += 64
segment = libc.shmget(0, 64 * MIB, 0o600)
if segment >= 0:
    total += 64
print(total)
