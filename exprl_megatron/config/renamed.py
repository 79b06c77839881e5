"""Keys of the config that have another name now: an old key is refused, and the error states the new one."""

from collections.abc import Sequence

RENAMED_KEYS = {
    "policy.starting_policy": "ref_policy",
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
