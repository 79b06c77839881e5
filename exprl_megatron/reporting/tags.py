"""Tags of metrics in a tracker: the stage, a group, the name."""

EVALUATION = "evaluation/"
"""The names of an evaluation's metrics begin so."""
_UPDATE = "update"
"""The group of what has no group in metrics.jsonl: `loss`, `entropy`, `grad_norm` and the like."""


def tag(stage: str, name: str) -> str:
    """Return the tag of a metric, `STAGE/GROUP/NAME`; an evaluation measures the same in all stages and has no stage.

    Stages measure different quantities under one name: `reward/mean` is a judge's score in one and a share of right
    answers in the next.
    """
    if name.startswith(EVALUATION):
        return name
    return f"{stage}/{name}" if "/" in name else f"{stage}/{_UPDATE}/{name}"
