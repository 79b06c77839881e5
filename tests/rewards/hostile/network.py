"""Reaches a server of the same machine, by TCP, UDP and local sockets."""

import ctypes
import json
import socket

told = json.loads(input())
libc = ctypes.CDLL(None)
SOCKET, IO_URING_SETUP = 41, 425
for connect in (
    lambda: socket.create_connection(("127.0.0.1", told["port"]), timeout=1).sendall(b"hello"),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", told["port"])),
    lambda: socket.socket(socket.AF_UNIX).connect(told["local"]),
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    lambda: socket.socketpair(),
    lambda: socket.getaddrinfo("localhost", told["port"]),
):
    try:
        connect()
        print("connected")
    except OSError:
        continue
for family in (1, 2, 10, 16, 17, 40):
    if libc.syscall(SOCKET, family, 1, 0) >= 0:
        print("connected")
if libc.syscall(IO_URING_SETUP, 8, ctypes.create_string_buffer(256)) >= 0:
    print("connected")
