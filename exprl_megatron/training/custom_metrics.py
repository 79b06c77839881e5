"""Metrics of the user: functions of a step's graded groups whose numbers are logged with the other metrics."""

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from exprl_megatron.plugins.calling import Plugin, as_number, described
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.rollout.group import Group, StepInfo

ARGUMENTS = ("step", "groups")
CUSTOM = "custom/"
"""Prefix of the user's metrics, which distinguishes them from all others."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.@-]{,59}")
_MAX_NUMBERS = 200
"""Maximum number of metrics that one function returns for a step."""
_DEADLINE_S = 60.0
"""Maximum time in seconds that a step waits for all functions."""


StepMetrics = Callable[[StepInfo, Sequence[Group]], dict[str, float]]


def custom_step_metrics(paths: Sequence[str]) -> StepMetrics:
    """Return a function that computes the metrics of all functions in `paths`.

    Raises:
        PluginError: a function cannot be loaded or takes other arguments. The returned function raises it where one
            fails, does not return a mapping of names to numbers, or returns the same name as another.
    """
    plugins = [Plugin.load(f"step_metrics.{number}", path) for number, path in enumerate(paths)]
    for plugin in plugins:
        plugin.check_arguments(ARGUMENTS)

    def metrics(step: StepInfo, groups: Sequence[Group]) -> dict[str, float]:
        found: dict[str, float] = {}
        for plugin in plugins:
            custom = plugin.guarded(partial(checked_metrics, plugin, plugin(step, tuple(groups))))
            if twice := sorted(custom.keys() & found.keys()):
                raise plugin.failure(f"returned {twice[0].removeprefix(CUSTOM)!r}, as another of step_metrics does")
            found |= custom
        return found

    return metrics


def log_failures(metrics: StepMetrics, log: Callable[[str], None], deadline_s: float = _DEADLINE_S) -> StepMetrics:
    """Return `metrics` as a function that logs the first failure, and returns no metrics instead of raising.

    It is not called again if it has no result within `deadline_s` seconds.
    """
    failed: list[str] = []
    hangs: list[bool] = []

    def found(step: StepInfo, groups: Sequence[Group]) -> dict[str, float]:
        if hangs:
            return {}
        results: list[dict[str, float]] = []
        errors: list[PluginError] = []

        def work() -> None:
            try:
                results.append(metrics(step, groups))
            except PluginError as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="step-metrics", daemon=True)
        thread.start()
        thread.join(deadline_s)
        if thread.is_alive():
            hangs.append(True)
            log(f"step_metrics gave no result within {deadline_s:g} s and is not called again; the run continues.")
        elif errors:
            if not failed:
                log(f"{errors[0]} The step has no metrics of step_metrics; later failures are not reported.")
            failed.append(str(errors[0]))
        return results[0] if results and not hangs else {}

    return found


def checked_metrics(plugin: Plugin, found: object) -> dict[str, float]:
    """Return the numbers of a function's result under names that begin with `custom/`.

    Raises:
        PluginError: the result is not a mapping of short names to numbers.
    """
    if not isinstance(found, Mapping):
        raise plugin.failure(f"returned {described(found)} instead of a mapping of names to numbers")
    if len(found) > _MAX_NUMBERS:
        raise plugin.failure(f"returned {len(found)} numbers for a step, more than {_MAX_NUMBERS}")
    checked = {}
    for name, value in found.items():
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise plugin.failure(f"returned the name {name!r}; use at most 60 lower-case letters, digits, and _ . @ -")
        checked[CUSTOM + name] = as_number(value)
        if math.isnan(checked[CUSTOM + name]):
            raise plugin.failure(f"returned {name!r} as {described(value)} that is not a number")
    return checked
