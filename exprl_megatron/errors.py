"""Errors that the command line and the loop distinguish."""

import errno
import os


class UserError(Exception):
    """Something the user can fix.

    The message is one sentence (or one line for each violation) that names the thing, its value
    and the remedy; the command line prints it without a traceback and exits with status 2.
    """


class ServerError(Exception):
    """A server has died, hangs, refuses a request or sends an invalid reply.

    The message names the server, what was asked of it, its log file and the last lines of that log.
    """


class RequestRefused(ServerError):
    """A running server refuses this one request (HTTP 400, 413, 422); repeating it is pointless.

    `said` holds the server's own words.
    """

    def __init__(self, message: str, said: str):
        super().__init__(message)
        self.said = said


class KeyRefused(ServerError):
    """A server that refuses the key of the request, or a request without one (HTTP 401); waiting does not help."""


class Preempted(Exception):
    """The run was asked to stop (SIGUSR1), and did so at a place that --resume continues from.

    The message says at which; the command line exits with status 75 (EX_TEMPFAIL: try again).
    """


class WeightsDiffer(ServerError):
    """A server holds other weights than were sent to it; the message names the tensors."""


class WeightsReplaced(ServerError):
    """A server serves other weights than this run sent to it; the message names both."""


class RunStopped(Exception):
    """The run stopped itself: a bound of the config was exceeded.

    The message names the bound, what was measured, and what to look at.
    """


class GradientNotFinite(RunStopped):
    """The norm of a gradient is NaN or infinite; nothing was updated, and the gradient is deleted."""


_STORAGE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "raise the quota or make room there",
    errno.EROFS: "choose a directory that can be written to",
    errno.EACCES: "choose a directory that this user may write to",
    errno.EPERM: "choose a directory that this user may write to",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "choose a path whose parts are directories",
    errno.EEXIST: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


_NO_FILES = ("/proc", "/sys")
"""Directories of the kernel, in which nothing can be made; it says that what is to be made is not there."""


def holds_no_files(path: object) -> bool:
    """Return whether `path` is in a directory of the kernel, in which no files can be created."""
    found = os.path.realpath(os.fspath(path)) if isinstance(path, str | os.PathLike) else ""
    return any(found == place or found.startswith(f"{place}/") for place in _NO_FILES)


def storage_sentence(error: BaseException, where: object = "a file") -> str | None:
    """Return one sentence about an error of the file system: no space, no permission, or a path that cannot be used;
    None for any other error.

    `where` is named if the error itself names no file, as when a disk is full.
    """
    if isinstance(error, FileNotFoundError) and holds_no_files(error.filename):
        return f"Cannot use {error.filename}, which the kernel keeps; choose a place on a disk, then start again."
    if not isinstance(error, OSError) or error.errno not in _STORAGE:
        return None
    if error.filename is None and error.errno in (errno.EACCES, errno.EPERM):
        # The error is of a process, a port or a socket.
        return None
    return f"Cannot use {error.filename or where} ({error.strerror}); {_STORAGE[error.errno]}, then start again."


def exit_status(error: BaseException) -> int:
    """Exit status of a process that `error` ends: 2 if the user can fix it, 75 if it was asked to stop, else 1."""
    if isinstance(error, UserError) or storage_sentence(error) is not None:
        return 2
    return os.EX_TEMPFAIL if isinstance(error, Preempted) else 1
