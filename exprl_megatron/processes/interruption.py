"""Ctrl-C and SIGTERM end a command and all that it started, in one sentence; a second signal cannot cut that short."""

import os
import signal
import sys
import threading
from typing import Any, NoReturn

# This is long enough for code that cannot propagate an exception to return, and too short to notice.
_RESEND_AFTER_S = 0.05
_raised: dict[int, BaseException] = {}
_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(SystemExit):
    """The first SIGINT or SIGTERM, raised in the main thread; its exit status is 128 + the signal.

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
    """Let the first SIGINT or SIGTERM raise Interrupted; later ones only print that the program is ending.

    A signal that is ignored, as SIGINT by a shell's background jobs, stays so.
    """

    def answer(number: int, _frame: object) -> None:
        if _raised.keys() & _NAMES.keys():
            # Not `print`: the signal may have interrupted one.
            os.write(2, b"exprl: still ending what was started; this takes half a minute at most.\n")
            return
        raise_from_handler(number, Interrupted(number))

    for number in _NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)


def raise_from_handler(number: int, error: BaseException) -> NoReturn:
    """Raise what signal `number` has to raise in the main thread, in its handler, so that it cannot be lost.

    Python runs a handler between any two bytecodes, also in a finalizer, a weak reference's callback or a hook, whose
    exceptions it gives to `sys.unraisablehook` and drops. The signal is then sent again a moment later.
    """
    if sys.unraisablehook is not _send_again:
        sys.unraisablehook = _send_again
    _raised[number] = error
    raise error


def _send_again(dropped: Any) -> None:
    number = next((number for number, error in _raised.items() if error is dropped.exc_value), None)
    if number is None:
        sys.__unraisablehook__(dropped)
        return
    del _raised[number]
    again = threading.Timer(_RESEND_AFTER_S, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
