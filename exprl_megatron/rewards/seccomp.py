"""A seccomp filter that allows a process to use its memory, open files, clocks and threads, and nothing else.

System calls that open a file, make a socket, start a process or a program, send a signal, or change another process or
limits fail with EPERM. The filter needs no privilege and cannot be removed.

The filter is written here and not by libseccomp because a cluster's image often lacks that C library, and users cannot
install it there without root's rights. PyPI has no binding that contains it: `pyseccomp` (MIT, 0.1.2 of January 2021
is its last release) loads the system's copy, which it looks up by running ldconfig or a compiler; libseccomp's own
binding needs the same copy. An allow list needs one comparison for each call, so that the library would save little.
"""

import ctypes
import errno
import os
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_ALLOWED = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10,
        "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17,
        "readv": 19, "writev": 20, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
        "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60,
        "uname": 63, "getcwd": 79, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
        "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
        "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
        "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "getrandom": 318, "rseq": 334,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
        "pread64": 67, "pselect6": 72, "ppoll": 73, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98,
        "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
        "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
        "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
        "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165,
        "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222,
        "mprotect": 226, "madvise": 233, "getrandom": 278, "rseq": 293,
    },
}  # fmt: skip

_NUMBERS = {
    "x86_64": {"clone": 56, "fcntl": 72, "ioctl": 16, "prlimit64": 302, "newfstatat": 262, "seccomp": 317},
    "aarch64": {"clone": 220, "fcntl": 25, "ioctl": 29, "prlimit64": 261, "newfstatat": 79, "seccomp": 277},
}
_CLONE3 = 435

_NEW_THREAD = 0x3D0F00
"""The flags with which glibc starts a thread: everything shared, no new namespace."""
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. F_SETOWN would make the kernel send signals to any process."""
_IOCTL_REQUESTS = (0x5401, 0x5450, 0x5451)
"""TCGETS (is this a terminal?), FIONCLEX, FIOCLEX."""
_AT_EMPTY_PATH = 0x1000

_SET_MODE_FILTER = 1
_NEW_LISTENER = 8
_PR_SET_NO_NEW_PRIVS = 38

_KILL, _ERROR, _NOTIFY, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1


def is_supported() -> bool:
    """Return whether there is a filter for this machine's system calls."""
    return hasattr(os, "uname") and os.uname().sysname == "Linux" and os.uname().machine in _ALLOWED


def set_no_new_privileges() -> None:
    """Prevent this process from gaining privileges by exec, which seccomp and Landlock require.

    Raises:
        OSError: the kernel refuses it.
    """
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def notify_threads() -> int | None:
    """Let the holder of the returned file descriptor decide on every new thread; None before Linux 5.5.

    Call it before `install_filter`, whose filter decides on all other system calls.
    """
    clone = _NUMBERS[os.uname().machine]["clone"]
    program = [_load(0), _skip_unless(clone, 1), _return(_NOTIFY), _return(_ALLOW)]
    try:
        return _install(program, _NEW_LISTENER)
    except OSError:
        return None


def decide_thread(listener: int, allow: bool) -> None:
    """Allow the thread that waits at `listener`, or make its start fail with EAGAIN."""
    import fcntl

    request = bytearray(_NOTIFICATION.size)
    fcntl.ioctl(listener, _RECEIVE, request)
    identifier = _NOTIFICATION.unpack(request)[0]
    error, flags = (0, _CONTINUE) if allow else (-errno.EAGAIN, 0)
    fcntl.ioctl(listener, _SEND, _RESPONSE.pack(identifier, 0, error, flags))


def install_filter(threads: bool) -> None:
    """Restrict this process to computing and to reading and writing its open files.

    Args:
        threads: whether it may start threads; `notify_threads` has been called before.

    Raises:
        OSError: the kernel refuses the filter.
    """
    machine = os.uname().machine
    numbers = _NUMBERS[machine]
    program = [_load(4), _skip_unless(_AUDIT_ARCH[machine], 1), _skip(1), _return(_KILL), _load(0)]
    for number in _ALLOWED[machine].values():
        program += [_skip_unless(number, 1), _return(_ALLOW)]
    program += _allow_argument(numbers["fcntl"], 1, _FCNTL_COMMANDS)
    program += _allow_argument(numbers["ioctl"], 1, _IOCTL_REQUESTS)
    program += _allow_reading_limits(numbers["prlimit64"])
    program += _allow_argument(numbers["newfstatat"], 3, (_AT_EMPTY_PATH,))
    if threads:
        program += _allow_argument(numbers["clone"], 0, (_NEW_THREAD,))
    # glibc tries clone3 first, whose flags a filter cannot see, and then falls back to clone.
    program += [_skip_unless(_CLONE3, 1), _return(_ERROR | errno.ENOSYS), _return(_ERROR | errno.EPERM)]
    _install(program, 0)


def _allow_argument(number: int, place: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow the call `number` where the lower half of its argument `place` is one of `values`; else EPERM."""
    block = [_load(16 + 8 * place)]
    for value in values:
        block += [_skip_unless(value, 1), _return(_ALLOW)]
    block.append(_return(_ERROR | errno.EPERM))
    return [_skip_unless(number, len(block)), *block]


def _allow_reading_limits(number: int) -> list[bytes]:
    """Allow prlimit64 only of this process and without new limits (a null pointer in both halves); else EPERM.

    A program that lowered its own CPU limit would be killed early, as if from outside.
    """
    refuse, block = _return(_ERROR | errno.EPERM), []
    for offset in (16, 16 + 8 * 2, 16 + 8 * 2 + 4):
        block += [_load(offset), _skip_unless(0, 1), _skip(1), refuse]
    block.append(_return(_ALLOW))
    return [_skip_unless(number, len(block)), *block]


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", 0x20, 0, 0, offset)


def _skip(count: int) -> bytes:
    return struct.pack("=HBBI", 0x05, 0, 0, count)


def _skip_unless(value: int, count: int) -> bytes:
    """Skip the next `count` instructions unless the loaded value equals `value`."""
    return struct.pack("=HBBI", 0x15, 0, count, value)


def _return(action: int) -> bytes:
    return struct.pack("=HBBI", 0x06, 0, 0, action)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install(instructions: list[bytes], flags: int) -> int:
    program = _Program(len(instructions), b"".join(instructions))
    number = _NUMBERS[os.uname().machine]["seccomp"]
    return _check(_libc().syscall(number, _SET_MODE_FILTER, flags, ctypes.byref(program)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
