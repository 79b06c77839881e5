"""The one error type whose message is meant for the user as it stands."""


class UserError(Exception):
    """Something the user can mend.

    The message is one sentence (or one line for each violation) that names the thing, its value
    and the remedy; the command line prints it without a traceback and exits with status 2.
    """
