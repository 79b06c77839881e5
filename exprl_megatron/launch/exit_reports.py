"""Reports of how a rank or a node ended: written where it ended, and raised as an error where the run is led."""

import json
import os

import msgspec

from exprl_megatron.errors import Preempted, RunStopped, UserError, exit_status

_ENDS = {2: UserError, os.EX_TEMPFAIL: Preempted}
"""The error for each exit status that a rank or a node reports; RunStopped for any other."""


class RankKilled(RunStopped):
    """A rank was killed by a signal, which is the cause of all failures that follow."""


class RankFailed(RunStopped):
    """An unexpected error of a rank; possibly the loss of a connection to another rank."""


class ExitReport(msgspec.Struct, frozen=True):
    """The report of how a rank or a node ended."""

    status: int
    message: str
    unexpected: bool


def exit_report(error: Exception) -> str:
    """Return the report (JSON) of the error that ended a node's ranks; `parse_exit_report` is its inverse."""
    unexpected = isinstance(error, RankFailed)
    return json.dumps({"status": exit_status(error), "message": str(error), "unexpected": unexpected})


def parse_exit_report(text: bytes, what: str) -> ExitReport:
    """Parse a report (JSON); where it is damaged, return a report that says so about `what`."""
    try:
        return msgspec.json.decode(text, type=ExitReport)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"{what} of its end is garbled ({error}); see the logs of that node, and continue with --resume."
        return ExitReport(1, message, unexpected=True)


def exit_error(reported: ExitReport) -> Exception:
    """Return the exception of a report."""
    kind = RankFailed if reported.unexpected else _ENDS.get(reported.status, RunStopped)
    return kind(reported.message)
