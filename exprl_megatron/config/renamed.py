"""Renamed keys and values of the config: an old name is refused, and the error states the new one."""

from collections.abc import Sequence
from typing import Any

RENAMED_KEYS = {
    "policy.starting_policy": "ref_policy",
    "policy.initialise": "initialize",
    "sync.hold": "pause_mode",
    "judge.place": "placement",
    "stages.*.unit": "granularity",
    "stages.*.routes.*.unit": "granularity",
}
"""From the path of an old key, `*` for a stage's number or a key that the user chooses, to the new name of its last
part."""

RENAMED_VALUES = {
    "stages.*.advantage": {
        "group-normalised": "group-normalized",
        "mean-centred": "mean-centered",
        "batch-normalised": "batch-normalized",
        "group-centred-batch-normalised": "group-centered-batch-normalized",
    },
    "stages.*.overlong": {"penalise": "penalize"},
}
"""From the path of a key to the new name of each old value."""


def new_name(path: Sequence[str | int]) -> str | None:
    """Return the new name of the last part of `path`; None where no key of this path was renamed."""
    return next((new for old, new in RENAMED_KEYS.items() if _matches(old, path)), None)


def new_value(path: Sequence[str | int], value: Any) -> str | None:
    """Return the new name of `value` of the key at `path`; None where no value of this name was renamed."""
    names = next((names for key, names in RENAMED_VALUES.items() if _matches(key, path)), {})
    return names.get(value) if isinstance(value, str) else None


def with_new_names(tree: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Return a copy of `tree` (plain dicts and lists) with today's names: the config of a run of an earlier version."""
    if isinstance(tree, list):
        return [with_new_names(item, (*path, place)) for place, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return new_value(path, tree) or tree
    return {new_name((*path, key)) or key: with_new_names(item, (*path, key)) for key, item in tree.items()}


def _matches(pattern: str, path: Sequence[str | int]) -> bool:
    parts = pattern.split(".")
    return len(parts) == len(path) and all(part in ("*", str(key)) for part, key in zip(parts, path, strict=True))
