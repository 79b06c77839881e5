"""Keys of the config that have another name now: an old key is refused, and the error states the new one."""

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


def new_name(path: Sequence[str | int]) -> str | None:
    """Return the new name of the last part of `path`; None where no key of this path was renamed."""
    for old, new in RENAMED_KEYS.items():
        parts = old.split(".")
        if len(parts) == len(path) and all(part in ("*", str(key)) for part, key in zip(parts, path, strict=True)):
            return new
    return None


def with_new_names(tree: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Return a copy of `tree` (plain dicts and lists) with today's names: the config of a run of an earlier version."""
    if isinstance(tree, list):
        return [with_new_names(item, (*path, place)) for place, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    return {new_name((*path, key)) or key: with_new_names(item, (*path, key)) for key, item in tree.items()}
