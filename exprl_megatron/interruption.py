"""Ctrl-C and SIGTERM end a command and all that it started, in one sentence; a second signal cannot cut that short."""

import os
import signal

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(SystemExit):
    """The first of such signals, raised in the main thread; its exit status is 128 + the signal.

    A SystemExit, so that neither `except Exception` nor an event loop keeps it.
    """

    def __init__(self, number: int, advice: str = ""):
        super().__init__(128 + number)
        self.number = number
        self.advice = advice

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"Stopped by {_NAMES.get(self.number, self.number)}, and so is all that it had started{advice}."


def end_on_signals() -> None:
    """From now on the first SIGINT or SIGTERM raises Interrupted, and later ones only say that the end is under way.

    A signal that is ignored, as SIGINT by a shell's background jobs, stays so.
    """
    interrupted: list[int] = []

    def answer(number: int, _frame: object) -> None:
        if interrupted:
            # Not `print`: the signal may have come in the midst of one.
            os.write(2, b"exprl: still ending what was started; this takes half a minute at most.\n")
            return
        interrupted.append(number)
        raise Interrupted(number)

    for number in _NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)
