"""Metrics of the user: functions of a step's graded groups whose numbers are logged beside the others."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

from exprl_megatron.plugins.calling import Plugin, described
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.rollout.group import Group, StepInfo

ARGUMENTS = ("step", "groups")
OWN = "own/"
"""The names of the user's metrics begin so, and are thus no others."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.@-]*")


StepMetrics = Callable[[StepInfo, Sequence[Group]], dict[str, float]]


def own_step_metrics(paths: Sequence[str]) -> StepMetrics:
    """Return a function that computes the metrics of all functions in `paths`.

    Raises:
        PluginError: one cannot be loaded or takes other arguments. The function raises it where one fails, returns
            no mapping of names to numbers, or has a name in common with another.
    """
    plugins = [Plugin.load(f"step_metrics.{number}", path) for number, path in enumerate(paths)]
    for plugin in plugins:
        plugin.check_arguments(ARGUMENTS)

    def metrics(step: StepInfo, groups: Sequence[Group]) -> dict[str, float]:
        found: dict[str, float] = {}
        for plugin in plugins:
            own = checked_metrics(plugin, plugin(step, tuple(groups)))
            if twice := sorted(own.keys() & found.keys()):
                raise plugin.failure(f"returned {twice[0].removeprefix(OWN)!r}, as another of step_metrics does")
            found |= own
        return found

    return metrics


def never_stopping(metrics: StepMetrics, say: Callable[[str], None]) -> StepMetrics:
    """Return `metrics` as a function that gives `say` the first failure and returns no metrics instead of failing."""
    failed: list[str] = []

    def found(step: StepInfo, groups: Sequence[Group]) -> dict[str, float]:
        try:
            return metrics(step, groups)
        except PluginError as error:
            if not failed:
                say(f"{error} The step has no metrics of step_metrics; later failures are not reported.")
            failed.append(str(error))
            return {}

    return found


def checked_metrics(plugin: Plugin, found: object) -> dict[str, float]:
    """Return the numbers under names that begin with `own/`. Raises PluginError where it is no such mapping."""
    if not isinstance(found, Mapping):
        raise plugin.failure(f"returned {described(found)} instead of a mapping of names to numbers")
    checked = {}
    for name, value in found.items():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise plugin.failure(f"returned the name {name!r}; use lower-case letters, digits, and _ . @ -")
        try:
            checked[OWN + name] = float(value)
        except (TypeError, ValueError):
            checked[OWN + name] = math.nan
        if math.isnan(checked[OWN + name]):
            raise plugin.failure(f"returned {name!r} as {described(value)} that is not a number")
    return checked
