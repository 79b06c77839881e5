"""Asks the kernel for everything that it gives only to the trusted, or that widens what can be attacked."""

import ctypes

libc = ctypes.CDLL(None)
page = ctypes.create_string_buffer(4096)
SYSTEM_CALLS = {
    "setuid": (105, 0),
    "setresuid": (117, 0, 0, 0),
    "capset": (126, page, page),
    "mount": (165, b"/", b"/", 0, 4096, 0),
    "chroot": (161, b"/"),
    "unshare a user namespace": (272, 0x10000000),
    "unshare a mount namespace": (272, 0x20000),
    "setns": (308, 0, 0),
    "bpf": (321, 0, page, 128),
    "perf_event_open": (298, page, 0, -1, -1, 0),
    "userfaultfd": (323, 0),
    "keyctl": (250, 0, -3, 0),
    "add_key": (248, b"user", b"x", b"y", 1, -3),
    "io_uring_setup": (425, 8, page),
    "memfd_create": (319, b"x", 0),
    "shmget": (29, 0, 4096, 0o600),
    "mq_open": (240, b"/x", 0o102, 0o600, 0),
    "pipe": (22, page),
    "eventfd": (290, 0, 0),
    "epoll_create1": (291, 0),
    "inotify_init1": (294, 0),
    "personality": (135, 0x0040000),
    "outlive the parent": (157, 1, 0, 0, 0, 0),
    "seccomp": (317, 1, 0, page),
    "setsid": (112,),
    "setpgid": (109, 0, 0),
    "execve": (59, b"/bin/true", 0, 0),
    "open_tree": (428, -100, b"/", 1),
    "name_to_handle_at": (303, -100, b"/", page, page, 0),
    "sethostname": (170, b"x", 1),
    "syslog": (103, 3, page, 100),
    "setrlimit": (160, 0, page),
    "ioperm": (173, 0, 1, 1),
    "modify_ldt": (154, 0, page, 16),
    "getpid of the x32 ABI": (0x40000027,),
}
print([name for name, (number, *arguments) in SYSTEM_CALLS.items() if libc.syscall(number, *arguments) != -1])
