"""Finds the functions and classes that a config names.

Modules are searched in the working directory, in the directories of the config's `plugin_path`, and on the Python path,
in this order and in every process of a run alike.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exprl_megatron.config.plugin_path import entry_points_named, installed_plugins
from exprl_megatron.plugins.failures import PluginError, place_of_error


@dataclass(frozen=True)
class PluginSource:
    """The file that defines a plugin, and the hash of its content."""

    file: str
    sha256: str


def use_plugin_path(directories: Iterable[str]) -> None:
    """Search `directories`, after the working directory, for plugins from now on in this process."""
    wanted = [str(Path(directory).expanduser().resolve()) for directory in (".", *directories)]
    sys.path[:] = [*wanted, *(entry for entry in sys.path if entry not in wanted)]


def load_object(path: str) -> Any:
    """Return what `path` names.

    Raises:
        PluginError: the module cannot be imported, or has no such name.
    """
    module_name, name = _module_and_name(path)
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise PluginError(f"The plugin {path} cannot be imported: {_import_failure(module_name, error)}") from error
    file = getattr(found, "__file__", None) or module_name
    for part in name.split("."):
        if not hasattr(found, part):
            raise PluginError(f"The plugin {path} is not there: {file} defines no {part}; correct the name.")
        found = getattr(found, part)
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
            found = found()
        except (Exception, SystemExit) as error:
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


def _import_failure(module_name: str, error: BaseException) -> str:
    """What failed, and in which of the user's lines."""
    wanted = {".".join(module_name.split(".")[: n + 1]) for n in range(module_name.count(".") + 1)}
    if isinstance(error, ModuleNotFoundError) and error.name in wanted:
        return (
            f"there is no module {error.name} in the working directory ({Path.cwd()}), in plugin_path or on the "
            "Python path; correct the path, or add the directory to plugin_path."
        )
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}."
    return f"{place_of_error(error)}."
