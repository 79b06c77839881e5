"""Values that name the user's own code: `module:function`, or an installed entry point (docs/extending.md)."""

import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

ENTRY_POINTS = "exprl_megatron.plugins"
"""The group of entry points in which a package offers its plugins."""
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_PLUGIN = "module:function of your own, or an entry point of the group exprl_megatron.plugins"


@cache
def installed_plugins() -> dict[str, EntryPoint]:
    """Return the entry points of all installed packages, by name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def entry_points_named(name: str) -> list[EntryPoint]:
    """Return the entry points of that name which differ, where several packages have one, in the order of their
    values.
    """
    found = {point.value: point for point in entry_points(group=ENTRY_POINTS) if point.name == name}
    return [found[value] for value in sorted(found)]


def is_plugin(value: str) -> bool:
    """Return whether `value` has the form `module:function` or is the name of an entry point."""
    return _PATH.fullmatch(value) is not None or value in installed_plugins()


def _checked(value: str) -> str:
    if not is_plugin(value):
        raise PydanticCustomError("plugin", f"input should be {_PLUGIN}")
    return value


def choice_or_plugin(names: tuple[str, ...]) -> BeforeValidator:
    """Return a validator that accepts one of `names` or a plugin.

    Raises:
        PydanticCustomError: in validation, for any other value.
    """

    def checked(value: object) -> object:
        if isinstance(value, str) and (value in names or is_plugin(value)):
            return value
        known = ", ".join(map(repr, names))
        raise PydanticCustomError("plugin", f"input should be {known}, {_PLUGIN}")

    return BeforeValidator(checked)


PluginPath = Annotated[str, AfterValidator(_checked)]
"""`module:function`, or the name of an entry point in the group `exprl_megatron.plugins`."""
