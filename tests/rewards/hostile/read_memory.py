"""Prints what follows, anywhere in this process's memory, the beginning that it reads."""

import ctypes
import os
import sys

BEGINNING = input().encode()
PAGE, REACH = 4096, 2**27
RT_SIGPROCMASK, SIG_UNBLOCK = 14, 1
libc = ctypes.CDLL(None)
libc.syscall.argtypes = [ctypes.c_long] * 5
libc.sbrk.restype = ctypes.c_void_p


def readable(address):
    """The kernel reads eight bytes there, or fails with EFAULT."""
    return libc.syscall(RT_SIGPROCMASK, SIG_UNBLOCK, address, 0, 8) == 0


seen, pages = set(), 0
around = [
    id(object()),
    id(sys),
    libc.sbrk(0),
    id(bytearray(2**20)),
    ctypes.addressof(ctypes.create_string_buffer(2**20)),
]
for middle in {address // PAGE * PAGE for address in around}:
    for page in range(middle - REACH, middle + REACH, PAGE):
        if page in seen or page <= 0:
            continue
        seen.add(page)
        if not readable(page):
            continue
        pages += 1
        content = ctypes.string_at(page, PAGE)
        place = content.find(BEGINNING)
        while place >= 0:
            after = content[place + len(BEGINNING) : place + len(BEGINNING) + 30]
            if after.startswith(b"r-program"):
                os.write(1, b"found " + after + b"\n")
                os._exit(0)
            place = content.find(BEGINNING, place + 1)
print("searched" if pages > 1000 else f"only {pages} pages")
