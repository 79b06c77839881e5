"""Runs a program, or calls the function that it defines, in a contained process."""

import atexit
import builtins
import contextlib
import importlib
import json
import os
import random
import resource
import sys
import threading
import traceback
import types
import typing

from exprl_megatron.rewards.recursion import allow_deep_recursion

RESULT = 3
"""The file descriptor to which a call's value is written as JSON."""

MODULES = (
    "__future__", "abc", "argparse", "array", "ast", "asyncio", "atexit", "base64", "bdb", "binascii", "bisect", "bz2",
    "calendar", "cmath", "cmd", "code", "codecs", "collections", "collections.abc", "colorsys", "concurrent.futures",
    "concurrent.futures.process", "concurrent.futures.thread", "configparser", "contextlib", "contextvars", "copy",
    "copyreg", "csv", "ctypes", "dataclasses", "datetime", "decimal", "difflib", "dis", "email", "enum", "errno",
    "faulthandler", "filecmp", "fileinput", "fnmatch", "fractions", "functools", "gc", "getopt", "getpass", "gettext",
    "glob", "graphlib", "gzip", "hashlib", "heapq", "hmac", "html", "importlib", "inspect", "io", "ipaddress",
    "itertools", "json", "keyword", "linecache", "locale", "logging", "lzma", "marshal", "math", "mmap",
    "multiprocessing", "numbers", "opcode", "operator", "optparse", "os", "os.path", "pathlib", "pdb", "pickle",
    "pickletools", "pkgutil", "platform", "posixpath", "pprint", "pstats", "queue", "quopri", "random", "re",
    "reprlib", "resource", "sched", "secrets", "select", "selectors", "shelve", "shlex", "shutil", "signal", "site",
    "socket", "stat", "statistics", "string", "stringprep", "struct", "subprocess", "symtable", "sys", "sysconfig",
    "tempfile", "termios", "textwrap", "threading", "time", "timeit", "token", "tokenize", "traceback", "tracemalloc",
    "types", "typing", "unicodedata", "unittest", "urllib.parse", "uuid", "warnings", "weakref",
    "xml.etree.ElementTree", "zipfile", "zlib", "zoneinfo", "cProfile", "encodings.ascii", "encodings.idna",
    "encodings.latin_1", "encodings.utf_16", "encodings.utf_32", "encodings.utf_8_sig",
)  # fmt: skip
"""Modules that a program can import. They are loaded in advance, because a program cannot read files."""

OPTIONAL = (
    "numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random", "numpy.typing",
    "sortedcontainers", "typing_extensions", "sympy", "networkx", "mpmath", "more_itertools",
)  # fmt: skip
"""Further modules that solutions import, where they are installed."""

_STARS = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
          "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing")  # fmt: skip
_NAMED = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
          "itertools", "functools", "operator", "io", "sys", "json")  # fmt: skip


def load_modules(further: tuple[str, ...] = ()) -> None:
    """Import the modules that a program may use, where this Python has them."""
    for name in (*MODULES, *further):
        importlib.import_module(name)
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def prelude() -> dict[str, object]:
    """Return the names that LiveCodeBench's runner defines before the first line of a program."""
    names: dict[str, object] = {}
    for module in map(sys.modules.__getitem__, _STARS):
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        names.update((name, getattr(module, name)) for name in public)
    names.update((name, sys.modules[name]) for name in _NAMED)
    return names


def run(program: str, function: str | None, arguments: str, names: dict[str, object]) -> int:
    """Run the program, whose input is at file descriptor 0; returns the exit status.

    With `function` the program is imported, the function is called with one argument from each line of `arguments`, and
    its value is written to RESULT. Exceptions, also the NameError of a missing function, are printed to standard error
    and not raised; the exit status is then 1.
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
    # As Python does at the end of a process: join threads, call exit functions, flush output.
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
    # The module `site` would have added these.
    builtins.exit = builtins.quit = sys.exit
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    module.__dict__.update(stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
    sys.argv = [""]
    # Files cannot be read any more; without these entries the error says that the module does not exist.
    sys.path.clear()
    sys.path_importer_cache.clear()
    atexit._clear()
    random.seed(0)
    allow_deep_recursion()
    # Contest solutions first raise the stack's limit, which is raised already and which the filter refuses.
    resource.setrlimit = lambda limited, limits: None
    return module


def _find(module: types.ModuleType, function: str) -> typing.Callable:
    """Return the method of `Solution`, or the function of the module."""
    owner = getattr(module, "Solution", None)
    if isinstance(owner, type) and hasattr(owner, function):
        return getattr(owner(), function)
    found = getattr(module, function, None)
    if found is None:
        raise NameError(f"the program does not define {function}")
    return found


def _plain(value: object) -> object:
    """Convert a NumPy number to a Python one; JSON has no form for other types."""
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"the value is a {type(value).__name__}, which JSON does not support")
