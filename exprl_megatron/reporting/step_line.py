"""The line of a finished step, of at most WIDTH columns: the most important metrics come first."""

from collections.abc import Mapping

WIDTH = 100
SHOWN = (
    ("reward", "reward/mean"),
    ("right", "verifier/right"),
    ("loss", "loss"),
    ("overlong", "length/overlong"),
    ("gap", "sampler_gap/mean"),
    ("abstained", "reward/abstained"),
    ("kl", "kl/ref"),
    ("tokens", "length/mean"),
    ("entropy", "entropy"),
    ("grad", "grad_norm"),
)
"""Words of the line and their metrics, the most important first: the last ones are left out where they do not fit."""
_SHARES = ("right", "overlong", "abstained")
_WITHOUT_REWARD = "loss"
"""Shown only in stages without a reward: a policy-gradient loss says nothing about learning."""


def step_line(place: str, metrics: Mapping[str, float], end: str, room: int) -> str:
    """Return `place`, the metrics that fit into `room` columns between the two, and `end`."""
    line = place
    for word, name in SHOWN:
        if name not in metrics or (word == _WITHOUT_REWARD and "reward/mean" in metrics):
            continue
        # The verifier's share next to the judge's reward: this pair shows a policy that games its judge.
        separator = " " if word == "right" else "  "
        longer = f"{line}{separator}{word} {_share(metrics[name]) if word in _SHARES else _number(metrics[name])}"
        if len(longer) + len("  ") + len(end) > room:
            break
        line = longer
    return f"{line}  {end}"


def _share(value: float) -> str:
    """Return the share in percent, with one decimal below 10."""
    return f"{100 * value:.{1 if 0 < value < 0.0995 else 0}f}%"


def _number(value: float) -> str:
    """Return three significant digits, two with an exponent, which has no needless zero or sign."""
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
