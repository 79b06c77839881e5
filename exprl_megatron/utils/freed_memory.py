"""Whether the C library gives memory back to the kernel as soon as it is freed."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt's parameters (malloc.h)."""
LARGEST_THRESHOLD = 2**25
"""The largest block that glibc can be asked to take from its heap."""
KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MiB for the next allocation; returns whether the C library does so from now on.

    A step of training allocates and frees the same activations again and again, and every page that comes back from
    the kernel is filled with zeros first. What a process holds at its peak is the same. Settings of malloc in the
    environment take precedence.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, KEPT))
