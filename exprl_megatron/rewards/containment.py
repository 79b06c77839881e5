"""The layers that contain a program: required ones, and optional ones that are used where the kernel supports them.

Required, and available to any process on Linux (x86-64, ARM64):

* seccomp filter: files, network, processes, programs, signals, other processes' limits and memory;
* resource limits: memory, CPU time, number of open files, size of files, core dumps;
* wall clock and output limit, enforced by the worker: sleeping, endless output;
* no capabilities and no new privileges: the rights that root still has.

Optional:

* thread limit, enforced by the worker (Linux 5.5): number of threads; without it there are no threads at all;
* Landlock (Linux 5.13, switched on): files; TCP (6.7); signals and abstract sockets (6.12);
* user, network and IPC namespace (where permitted): network, System V IPC, and the remaining rights of root;
* empty root directory (with the namespace, or as root): names and sizes of files, which the filter leaves visible
  to raw system calls.

Landlock is called directly. The package `landlock` on PyPI (MIT) is a development release (1.0.0.dev5 of May 2025)
that supports only the rights on files, and neither TCP (6.7) nor signals and abstract sockets (6.12), which are denied
here. To deny everything takes two system calls and no rule; no path of Python or its libraries has to be allowed,
because modules are loaded in advance.

A process identifier namespace would add nothing: a program can neither start a process nor send a signal.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import tempfile
from dataclasses import dataclass

from exprl_megatron.rewards import recursion, seccomp

OPEN_FILES = 64
"""Largest number of open files of the worker; a program may have half as many."""

_NEWUSER, _NEWNET, _NEWIPC = 0x10000000, 0x40000000, 0x08000000
_PR_SET_PDEATHSIG = 1
_CAPABILITIES_VERSION = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_LANDLOCK_VERSION = 1


@dataclass(frozen=True)
class Limits:
    """Limits of a program in one test."""

    cpu_s: int = 6
    """CPU time of all threads together, in seconds."""
    wall_s: float = 12.0
    """Wall-clock time in seconds; more than `cpu_s`, since a busy machine delays a program that computes."""
    memory_bytes: int = 2 * 2**30
    """Address space in bytes."""
    output_bytes: int = 16 * 2**20
    """Bytes of standard output, standard error and result together."""
    threads: int = 64
    """Total number of threads that the program may start."""


DEFAULT_LIMITS = Limits()


def limit_worker() -> None:
    """Limit this process's open files, and make the kernel kill it and its programs first if memory runs out."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def drop_machine_access() -> list[str]:
    """Drop the access of this process, and of all programs that it starts, to network and files.

    Returns the names of the layers that the kernel granted. The process must have a single thread and must have loaded
    every module that it needs.
    """
    layers = []
    libc = ctypes.CDLL(None, use_errno=True)
    emptied = _enter_empty_directory()
    if libc.unshare(_NEWUSER | _NEWNET | _NEWIPC) == 0:
        layers.append("user namespace")
    if layers or libc.unshare(_NEWNET | _NEWIPC) == 0:
        layers.append("network namespace")
    if emptied and libc.chroot(b".") == 0:
        layers.append("empty root directory")
    return layers


def contain_program(parent: int, limits: Limits) -> None:
    """Apply the first part of containment in a program's process: limits, no capabilities, an end with its parent.

    Raises:
        OSError: the kernel refuses a part of it.
    """
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)
    for limited, most in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES // 2),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limited, (most, most))
    recursion.enlarge_stack()
    header, nothing = struct.pack("=Ii", _CAPABILITIES_VERSION, 0), struct.pack("=6I", *(6 * [0]))
    _check(libc.capset(header, nothing))
    seccomp.set_no_new_privileges()


def landlock_version() -> int:
    """Return the version of this kernel's Landlock; 0 where the kernel has none."""
    return max(0, ctypes.CDLL(None, use_errno=True).syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION))


def deny_with_landlock() -> None:
    """Deny this process everything that the kernel's Landlock can deny; open files stay usable.

    Call `seccomp.set_no_new_privileges` first.

    Raises:
        OSError: the kernel refuses it.
    """
    version = landlock_version()
    files = 2 ** (13 + (version >= 2) + (version >= 3) + (version >= 5)) - 1
    rules = struct.pack("=QQQ", files, 0b11, 0b11)
    known = 8 if version < 4 else 16 if version < 6 else 24
    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = _check(libc.syscall(_LANDLOCK_CREATE, rules, known, 0))
    try:
        _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0))
    finally:
        os.close(ruleset)


def _enter_empty_directory() -> bool:
    """Change to an empty directory that is then removed, so that it stays empty; False where none can be made."""
    try:
        path = tempfile.mkdtemp()
        os.chdir(path)
        os.rmdir(path)
    except OSError:
        return False
    return True


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
