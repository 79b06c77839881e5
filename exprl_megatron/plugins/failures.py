"""Error messages about a failing plugin: one sentence with the user's file and line."""

import functools
import inspect
import sysconfig
import threading
import traceback
from pathlib import Path

from exprl_megatron.errors import UserError

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

_LONGEST = 500
"""Characters of an exception's message that are shown."""


class PluginError(UserError):
    """The user's own code cannot be loaded, failed, or returned what it must not; names its file and line."""


def is_failure(error: BaseException) -> bool:
    """Return whether `error`, which code of the user raised in this thread, is a failure of that code.

    Ctrl-C is none. Exceptions that do not derive from Exception are failures too: asyncio.CancelledError, SystemExit,
    the panics of extensions that are written in Rust.
    """
    return not isinstance(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread()


def place_of_error(error: BaseException, function: object = None) -> str:
    """Return `FILE, line N, in NAME: Type: message` of the innermost frame in the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((_PACKAGE, "<"))]
    users = [frame for frame in own if not frame.filename.startswith(_LIBRARIES)]
    said = f"{type(error).__name__}: {_words(error)}".rstrip(": .")
    # A plugin of an installed package is in a library's directory itself.
    innermost = next(iter([*users[::-1], *own[::-1]]), None)
    if innermost is None:
        return f"{place_of_function(function)}: {said}"
    return f"{innermost.filename}, line {innermost.lineno}, in {innermost.name}: {said}"


def _words(error: BaseException) -> str:
    """Return the message of an exception in one line that can be encoded; empty where it cannot be formatted."""
    try:
        words = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    except Exception:
        return ""
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."


def place_of_function(function: object) -> str:
    """Return `FILE, line N` of the definition of a function, a class, or of the class of an instance."""
    while isinstance(function, functools.partial):
        function = function.func
    if callable(function):
        function = inspect.unwrap(function)
    defined = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        file = inspect.getsourcefile(defined)
        return f"{file}, line {inspect.getsourcelines(defined)[1]}"
    except (TypeError, OSError):
        return repr(function)
