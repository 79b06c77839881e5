"""Errors that the command line and the loop tell apart."""

import os


class UserError(Exception):
    """Something the user can mend.

    The message is one sentence (or one line for each violation) that names the thing, its value
    and the remedy; the command line prints it without a traceback and exits with status 2.
    """


class ServerError(Exception):
    """A server that is dead, hangs, refuses or answers nonsense.

    The message names the server, what was asked of it, its log file and the last lines of that log.
    """


class RequestRefused(ServerError):
    """A server that is up and does not take this one request (HTTP 400, 413, 422); to ask again is of no use.

    `said` holds the server's own words.
    """

    def __init__(self, message: str, said: str):
        super().__init__(message)
        self.said = said


class Preempted(Exception):
    """The run was asked to stop (SIGUSR1), and did so at a place that --resume goes on from.

    The message says at which; the command line exits with status 75 (EX_TEMPFAIL: try again).
    """


class WeightsDiffer(ServerError):
    """A server that holds other weights than it was sent; the message names the tensors."""


class RunStopped(Exception):
    """The run watched itself and stopped: a bound of the config was passed.

    The message names the bound, what was measured, and what to look at.
    """


def exit_status(error: BaseException) -> int:
    """What a process that `error` ends leaves: 2 the user can mend it, 75 it was asked to stop, 1 anything else."""
    return 2 if isinstance(error, UserError) else os.EX_TEMPFAIL if isinstance(error, Preempted) else 1
