"""Short forms of a config: `problems: FILE`, and a stage without a name."""

import re
from typing import Any


def expand_shorthand(tree: Any) -> Any:
    """Return `tree` (plain dicts and lists) with `problems: FILE` as `{source: FILE}` and each stage named.

    A stage without a name has that of its kind (of the user's class `my.stages:KeepEasy` it is keep-easy). What has
    another form than a config is returned as it is.
    """
    if not isinstance(tree, dict):
        return tree
    found = dict(tree)
    if isinstance(tree.get("stages"), list):
        found["stages"] = [_stage(stage) for stage in tree["stages"]]
    if isinstance(tree.get("evaluation"), dict):
        found["evaluation"] = _with_source(tree["evaluation"])
    return found


def _stage(stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    named = stage if "name" in stage or "kind" not in stage else {"name": _name(stage["kind"]), **stage}
    return _with_source(named)


def _name(kind: Any) -> Any:
    if not isinstance(kind, str) or ":" not in kind:
        return kind
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind.rpartition(":")[2].rpartition(".")[2])
    return words.replace("_", "-").strip("-").lower()


def _with_source(section: dict[str, Any]) -> dict[str, Any]:
    problems = section.get("problems")
    return section | {"problems": {"source": problems}} if isinstance(problems, str) else section
