"""What happens in a contained process: the program runs, or the function that it defines is called."""

import atexit
import builtins
import contextlib
import importlib
import json
import os
import random
import sys
import threading
import traceback
import types
import typing

RESULT = 3
"""The file descriptor to which a call's value is written as JSON."""

MODULES = (
    "abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "codecs", "collections",
    "collections.abc", "contextlib", "contextvars", "copy", "ctypes", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "gc", "graphlib", "hashlib", "heapq", "inspect", "io", "itertools", "json", "keyword",
    "locale", "math", "numbers", "operator", "os", "os.path", "pickle", "platform", "pprint", "queue", "random", "re",
    "resource", "secrets", "select", "signal", "statistics", "string", "struct", "sys", "textwrap", "threading",
    "time", "timeit", "traceback", "types", "typing", "unicodedata", "warnings", "weakref", "zlib", "encodings.ascii",
    "encodings.latin_1", "encodings.utf_16", "encodings.utf_8_sig",
)  # fmt: skip
"""What a program can import, loaded beforehand: no file can be read later."""

NUMPY = ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random")

_STARS = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
          "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing")  # fmt: skip
_NAMED = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
          "itertools", "functools", "operator", "io", "sys", "json")  # fmt: skip
_RECURSION_LIMIT = 50_000


def load_modules(further: tuple[str, ...] = ()) -> None:
    """Import all that a program may want, numpy among it where it is installed."""
    for name in (*MODULES, *further):
        importlib.import_module(name)
    try:
        for name in NUMPY:
            importlib.import_module(name)
        sys.modules["numpy"].random.seed(0)
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise


def prelude() -> dict[str, object]:
    """The names that LiveCodeBench's runner gives a program before its first line."""
    names: dict[str, object] = {}
    for module in map(sys.modules.__getitem__, _STARS):
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        names.update((name, getattr(module, name)) for name in public)
    names.update((name, sys.modules[name]) for name in _NAMED)
    return names


def run(program: str, function: str | None, arguments: str, names: dict[str, object]) -> int:
    """Run the program, which finds its input at file descriptor 0; returns the exit status.

    With `function` it is imported instead, the function called with one argument from each line of
    `arguments`, and the value written to RESULT. Exceptions are told at standard error.
    """
    write, dumps, loads, exit_functions = os.write, json.dumps, json.loads, atexit._run_exitfuncs
    module = _prepare("solution" if function else "__main__", names)
    status = 0
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        if function is not None:
            value = _find(module, function)(*(loads(line) for line in arguments.split("\n") if line.strip()))
            unsent = memoryview(dumps(value, default=_plain).encode())
            while unsent:
                unsent = unsent[write(RESULT, unsent) :]
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
        status = 1
    # As at the end of any Python process: threads that are no daemons, exit functions, what is still unwritten.
    threading._shutdown()
    exit_functions()
    for stream in (sys.stdout, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(AttributeError, ValueError):  # the program may have replaced or closed it
            stream.flush()
    return status


def _prepare(name: str, names: dict[str, object]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    # What the module `site` would have added.
    builtins.exit = builtins.quit = sys.exit
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    module.__dict__.update(stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
    sys.argv = [""]
    # Nothing can be read from there any more; this way the error is that there is no such module.
    sys.path.clear()
    sys.path_importer_cache.clear()
    atexit._clear()
    random.seed(0)
    sys.setrecursionlimit(_RECURSION_LIMIT)
    return module


def _find(module: types.ModuleType, function: str) -> typing.Callable:
    """The method of `Solution`, or the function of the module."""
    owner = getattr(module, "Solution", None)
    if isinstance(owner, type) and hasattr(owner, function):
        return getattr(owner(), function)
    found = getattr(module, function, None)
    if found is None:
        raise NameError(f"the program defines no {function}")
    return found


def _plain(value: object) -> object:
    """A number of numpy as one of Python; anything else has no form in JSON."""
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"the value is a {type(value).__name__}, which JSON does not have")
