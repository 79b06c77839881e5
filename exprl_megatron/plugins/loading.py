"""Finds the functions and classes that a config names.

Modules are searched in the working directory, in the directories of the config's `plugin_path`, and on the Python path,
in this order and in every process of a run alike.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from exprl_megatron.config.plugin_path import entry_points_named, installed_plugins
from exprl_megatron.plugins.failures import PluginError, is_failure, place_of_error
from exprl_megatron.plugins.long_calls import says_what_takes_long


@dataclass(frozen=True)
class PluginSource:
    """The file that defines a plugin, and the hash of its content."""

    file: str
    sha256: str


_plugin_directories: list[str] = []


def use_plugin_path(directories: Iterable[str]) -> None:
    """Search `directories`, after the working directory, for plugins from now on in this process."""
    wanted = [str(Path(directory).expanduser().resolve()) for directory in (".", *directories)]
    sys.path[:] = [*wanted, *(entry for entry in sys.path if entry not in wanted)]
    _plugin_directories[:] = wanted


def load_object(path: str) -> Any:
    """Return what `path` names.

    Raises:
        PluginError: the module cannot be imported, or has no such name.
    """
    module_name, name = _module_and_name(path)
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    _refuse_taken_name(path, module_name)
    try:
        # Standard output is for what a command prints, which may be JSON.
        with redirect_stdout(sys.stderr), says_what_takes_long(lambda: f"importing {module_name} for {path} ..."):
            found: Any = importlib.import_module(module_name)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise PluginError(f"The plugin {path} cannot be imported: {_import_failure(module_name, error)}") from error
    file = _shown_file(found, module_name)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise PluginError(f"The plugin {path} is not there: {file} defines no {part}; correct the name.") from error
        except Exception as error:
            raise PluginError(f"The plugin {path} cannot be read from {file}: {place_of_error(error)}.") from error
    return found


@cache
def load_plugin(path: str) -> Callable[..., Any]:
    """Return the function of `path`; of a class, an instance made without arguments, one in each process.

    Raises:
        PluginError: as load_object, or what it names cannot be called.
    """
    found = load_object(path)
    if inspect.isclass(found):
        try:
            with says_what_takes_long(lambda: f"making an instance of {path} ..."):
                found = found()
        except BaseException as error:
            if not is_failure(error):
                raise
            raise PluginError(
                f"The plugin {path} cannot be made without arguments: {place_of_error(error, found)}; "
                "give its class an __init__ that needs none."
            ) from error
    if not callable(found):
        raise PluginError(
            f"The plugin {path} is a {type(found).__name__}, which cannot be called; name a function in {_file(path)}, "
            "or a class with a __call__ method."
        )
    return found


def plugin_source(path: str) -> PluginSource:
    """Return the file of the module that defines `path`, and its hash; raises what load_object raises."""
    load_object(path)
    file = _file(path)
    if file is None or not Path(file).is_file():
        return PluginSource(file or "unknown", "unknown")
    return PluginSource(file, hashlib.sha256(Path(file).read_bytes()).hexdigest())


def _file(path: str) -> str | None:
    return getattr(sys.modules[_module_and_name(path)[0]], "__file__", None)


def _module_and_name(path: str) -> tuple[str, str]:
    if ":" not in path:
        points = installed_plugins()
        if path not in points:
            raise PluginError(
                f"There is no plugin {path!r} among the entry points of the group exprl_megatron.plugins "
                f"({', '.join(sorted(points)) or 'none is installed'}); install its package, or give module:function."
            )
        named = entry_points_named(path)
        if len(named) > 1:
            packages = ", ".join(f"{point.value} of {point.dist.name if point.dist else '?'}" for point in named)
            raise PluginError(
                f"The entry point {path!r} is in several packages ({packages}); give module:function, or uninstall one."
            )
        path = named[0].value
    module_name, _, name = path.partition(":")
    return module_name, name.partition("[")[0].strip()


def _refuse_taken_name(path: str, module_name: str) -> None:
    """Raise PluginError where the user's module has the name of another one, which Python finds in its place."""
    name = module_name.partition(".")[0]
    own = _origin(name)
    if own is None:
        return
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if name in sys.stdlib_module_names and name != "test":  # which no library imports
        other = "a module of Python's standard library"
    elif loaded is not None and Path(loaded).resolve() != Path(own).resolve():
        other = f"imported from {loaded} already"
    else:
        return
    raise PluginError(f"The plugin {path} cannot be in {own}: {name} is {other}; rename your module.")


def _origin(name: str) -> str | None:
    """Return the file of the module `name` in the user's directories; None where there is none."""
    spec = PathFinder.find_spec(name, [str(Path.cwd()), *_plugin_directories])
    return spec.origin if spec is not None and spec.has_location else None


def _shown_file(module: Any, module_name: str) -> str:
    """Return the file of a module, for an error; a directory is marked as one."""
    if (file := getattr(module, "__file__", None)) is not None:
        return str(file)
    directory = next(iter(getattr(module, "__path__", ())), None)
    return module_name if directory is None else f"{directory}, a directory without __init__.py,"


def _import_failure(module_name: str, error: BaseException) -> str:
    """Return what failed, and in which line of the user's code."""
    wanted = {".".join(module_name.split(".")[: n + 1]) for n in range(module_name.count(".") + 1)}
    if isinstance(error, ModuleNotFoundError) and error.name in wanted:
        if module_name.endswith(".py"):
            return f"{module_name} is the name of a file; write the module's name, {module_name.removesuffix('.py')}."
        return (
            f"there is no module {error.name} in the working directory ({Path.cwd()}), in plugin_path or on the "
            "Python path; correct the path, or add the directory to plugin_path."
        )
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}."
    if isinstance(error, SyntaxError):
        return f"{_origin(module_name.partition('.')[0]) or module_name}: {type(error).__name__}: {error.msg}."
    return f"{place_of_error(error)}."
