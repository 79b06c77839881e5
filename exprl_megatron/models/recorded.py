"""An architecture as checkpoints record it, by this version or by an earlier one with fewer fields."""

import json
from dataclasses import MISSING, asdict, fields

from exprl_megatron.models.architecture import Architecture, Experts

_RENAMED = {"chosen": "top_k", "normalised": "norm_topk_prob"}
"""Fields of Experts under their name of an earlier version."""


def differing_fields(recorded: dict, architecture: Architecture) -> list[str]:
    """Return the fields, in order, that `recorded` (JSON of `asdict`) has otherwise than `architecture`.

    A field that `recorded` lacks had its default when it was written.
    """
    recorded = _defaults(Architecture) | recorded
    if recorded["experts"] is not None:
        recorded["experts"] = _defaults(Experts) | {
            _RENAMED.get(name, name): value for name, value in recorded["experts"].items()
        }
    given, mine = (json.loads(json.dumps(tree)) for tree in (recorded, asdict(architecture)))
    return sorted(name for name in given.keys() | mine.keys() if given.get(name) != mine.get(name))


def _defaults(kind: type) -> dict:
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}
