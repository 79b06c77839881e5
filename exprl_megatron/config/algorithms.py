"""Algorithms by the field's names: `algorithm` of a stage stands for the settings that make it that algorithm."""

from typing import Any

_KINDS = ("sparse-rl", "exprl-outcome")
"""Stages with one score a trace."""


def _loss(surrogate: str, clip: tuple[float, float], aggregation: str, kl: float = 0.0) -> dict[str, Any]:
    """Return every field of a loss that distinguishes algorithms, so that no default of a kind of stage remains."""
    low, high = clip
    return {
        "surrogate": surrogate,
        "clip_low": low,
        "clip_high": high,
        "dual_clip": None,
        "kl_coefficient": kl,
        "entropy_coefficient": 0.0,
        "aggregation": aggregation,
    }


ALGORITHMS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300: equation 3, and the KL coefficient of its experiments.
    "grpo": {"advantage": "group-normalized", "loss": _loss("clip", (0.2, 0.2), "sequence-mean", kl=0.04)},
    # arXiv 2503.20783: neither std nor response length in the objective, no KL.
    "dr_grpo": {"advantage": "mean-centered", "loss": _loss("clip", (0.2, 0.2), "constant-length")},
    # arXiv 2402.14740: the whole response is one action, so that its tokens are summed.
    "rloo": {"advantage": "leave-one-out", "loss": _loss("clip", (0.2, 0.2), "sequence-sum")},
    # arXiv 2503.14476: clip-higher, token mean, soft overlong punishment of all traces (section 3.4), no KL.
    "dapo": {
        "advantage": "group-normalized",
        "overlong": "score",
        "soft_overlong": {},
        "loss": _loss("clip", (0.2, 0.28), "token-mean"),
    },
    # arXiv 2507.18071: the ranges of its experiments.
    "gspo": {"advantage": "group-normalized", "loss": _loss("sequence-clip", (3e-4, 4e-4), "sequence-mean")},
    # arXiv 2506.13585: no lower bound.
    "cispo": {"advantage": "group-normalized", "loss": _loss("clipped-weight", (1.0, 0.28), "token-mean")},
    # arXiv 2501.03262; its KL is taken off the reward and is here a term of the loss.
    "reinforce++": {"advantage": "batch-normalized", "loss": _loss("clip", (0.2, 0.2), "token-mean", kl=1e-3)},
    "reinforce++-baseline": {
        "advantage": "group-centered-batch-normalized",
        "loss": _loss("clip", (0.2, 0.2), "token-mean", kl=1e-3),
    },
}
"""Name -> settings of a stage. DAPO's dynamic sampling, which is a setting of `sparse-rl` alone, is added there."""


def expand_algorithms(tree: Any) -> tuple[Any, list[str]]:
    """Return `tree` (plain dicts and lists) with the settings of each stage's `algorithm` in its place, and what is
    wrong.

    A setting that the stage has itself takes precedence over the algorithm's.
    """
    stages = tree.get("stages") if isinstance(tree, dict) else None
    if not isinstance(stages, list):
        return tree, []
    sentences = [sentence for number, stage in enumerate(stages) for sentence in _violations(number, stage)]
    if sentences:
        return tree, sentences
    return tree | {"stages": [_expanded(stage) for stage in stages]}, []


def _violations(number: int, stage: Any) -> list[str]:
    if not isinstance(stage, dict) or stage.get("algorithm") is None:
        return []
    key, name = f"stages.{number}.algorithm", stage["algorithm"]
    if stage.get("kind") not in _KINDS:
        return [f"{key} is {name!r}, but only stages of kind {' or '.join(_KINDS)} have one; remove it."]
    if not isinstance(name, str) or name not in ALGORITHMS:
        return [f"{key} is {name!r}; set it to one of {', '.join(ALGORITHMS)}."]
    settings = _settings(name, stage["kind"])
    if _leaves(_under(settings, stage)) == _leaves(stage):
        return [
            f"{key} is {name!r}, but the stage sets all that this would set; remove algorithm, or the other settings."
        ]
    return []


def _expanded(stage: Any) -> Any:
    if not isinstance(stage, dict) or "algorithm" not in stage:
        return stage
    name = stage["algorithm"]
    expanded = stage if name is None else _under(_settings(name, stage["kind"]), stage)
    return {key: value for key, value in expanded.items() if key != "algorithm"}


def _settings(name: str, kind: str) -> dict[str, Any]:
    rounds = {"dynamic_sampling": 4} if (name, kind) == ("dapo", "sparse-rl") else {}
    return ALGORITHMS[name] | rounds


def _under(settings: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """Return the stage with `settings` for what it does not set."""
    loss = stage.get("loss")
    if loss is not None and not isinstance(loss, dict):
        return settings | stage
    return settings | stage | {"loss": settings["loss"] | (loss or {})}


def _leaves(stage: dict[str, Any]) -> set[str]:
    """Return the names of the settings, those of the loss as `loss.NAME`."""
    loss = stage.get("loss")
    return {*stage, *(f"loss.{name}" for name in (loss if isinstance(loss, dict) else ()))}
