"""Calls plugins, and checks their arguments, errors and results."""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exprl_megatron.plugins.async_calls import contained, in_plugin_loop
from exprl_megatron.plugins.failures import PluginError, is_failure, place_of_error, place_of_function
from exprl_megatron.plugins.loading import load_plugin


@dataclass(frozen=True)
class Plugin:
    """A function of the user, and the key of the config that names it."""

    key: str
    path: str
    function: Callable[..., Any]

    @classmethod
    def load(cls, key: str, path: str) -> "Plugin":
        """Load the function of `path`.

        Raises:
            PluginError: it cannot be loaded; the error names `key`.
        """
        try:
            return cls(key, path, load_plugin(path))
        except PluginError as error:
            raise PluginError(f"{key}: {error}") from error

    @property
    def is_async(self) -> bool:
        """Whether a call returns an awaitable."""
        called = self.function if inspect.isroutine(self.function) else self.function.__call__  # type: ignore[operator]
        return inspect.iscoroutinefunction(called)

    def check_arguments(self, names: tuple[str, ...]) -> None:
        """Raise PluginError where the function cannot be called with as many positional arguments as `names`."""
        try:
            inspect.signature(self.function).bind(*names)
        except TypeError as error:
            raise self.failure(
                f"takes other arguments than ({', '.join(names)}): {error}; change its signature"
            ) from error
        except ValueError:
            return  # written in C, without a signature

    def __call__(self, *arguments: Any) -> Any:
        """Return what the function returns. Raises PluginError where it raises."""
        return self.guarded(lambda: self.function(*arguments))

    def guarded(self, work: Callable[[], Any]) -> Any:
        """Return what `work`, which runs code of the plugin, returns.

        Raises:
            PluginError: `work` raises.
        """
        try:
            return work()
        except PluginError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            raise PluginError(f"{self.key}: {self.path} failed at {place_of_error(error, self.function)}.") from error

    async def ask(self, *arguments: Any) -> Any:
        """Await the function's result, which is computed in another thread. Raises what it raises."""
        if self.is_async:
            return await in_plugin_loop(lambda: self.function(*arguments))
        found = await _in_daemon_thread(self.function, arguments)
        # A function that is not async may return what another async one does.
        return await in_plugin_loop(lambda: found) if inspect.isawaitable(found) else found

    def failure(self, what: str) -> PluginError:
        """Return an error that states `what` of the function, and where it is defined."""
        return PluginError(f"{self.key}: {self.path} ({place_of_function(self.function)}) {what}.")


def as_number(value: Any) -> float:
    """Return what a plugin returned as a number; nan where it is none, such as text, which float() would read."""
    if isinstance(value, str | bytes | bytearray):
        return math.nan
    try:
        return float(value)
    except Exception:
        return math.nan


def described(value: Any) -> str:
    """Describe what a plugin returned, for an error: the shape of a tensor, else the type."""
    shape = getattr(value, "shape", None)
    name = type(value).__name__
    return f"a {name}" if shape is None else f"a {name} of the shape {tuple(shape)}"


async def _in_daemon_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return what `function` returns or raises; a thread that never returns does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_it(value)

    def work() -> None:
        set_it: Callable[[Any], None]
        try:
            value, set_it = function(*arguments), future.set_result
        except StopIteration as error:  # no future takes it
            value, set_it = contained(error), future.set_exception
        except Exception as error:
            value, set_it = error, future.set_exception
        except BaseException as error:  # SystemExit would end the event loop
            value, set_it = contained(error), future.set_exception
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, set_it, value)

    threading.Thread(target=work, name="plugin", daemon=True).start()
    return await future
