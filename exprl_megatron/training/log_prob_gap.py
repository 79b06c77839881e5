"""The train-inference mismatch check: stops a run whose trainer and servers disagree about the same tokens."""

from dataclasses import dataclass

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import RunStopped

_MULTIPLE = 5.0
"""The gap of later steps may be this many times the gap of the run's first step."""
_COARSE = ("--quantization", "--kv-cache-dtype")
"""Arguments of SGLang that make its arithmetic coarser than the trainer's; such a server counts as FP8."""


@dataclass(frozen=True)
class _Default:
    """Bounds in nats per token; docs/config.md lists them."""

    first: float
    """Bound of the first step that compares log-probs."""
    floor: float
    """Smallest bound of later steps."""


_DEFAULTS = {"fp32": _Default(1e-4, 1e-4), "bf16": _Default(0.1, 0.02), "fp8": _Default(0.3, 0.05)}


def gap_bound(config: RunConfig, first_gap: float | None) -> float | None:
    """Compute the bound on `sampler_gap/mean`, in nats per token; None where nothing is compared.

    `first_gap` is the gap of the run's first step, None in that step itself.
    """
    if not config.compares_log_probs:
        return None
    if config.sync.max_log_prob_gap != "auto":
        return config.sync.max_log_prob_gap
    default = _DEFAULTS[coarsest_precision(config)]
    return default.first if first_gap is None else max(default.floor, _MULTIPLE * first_gap)


def coarsest_precision(config: RunConfig) -> str:
    """Return the coarsest precision of the trainer and the sampling servers: `fp32`, `bf16` or `fp8`."""
    precision = config.policy.precision
    coarse = not config.server.extra_options.isdisjoint(_COARSE)
    return "fp8" if precision.fp8 or config.sync.fp8 or coarse else precision.dtype


def check_log_prob_gap(metrics: dict[str, float], bound: float | None) -> None:
    """Compare `sampler_gap/mean` (nats per token) with `bound`; None: there is no bound.

    Raises:
        RunStopped: the gap exceeds the bound, or is nan.
    """
    gap = metrics.get("sampler_gap/mean")
    if bound is not None and gap is not None and not gap <= bound:  # true for nan
        raise RunStopped(
            f"Trainer and sampler log-probs of the same tokens differ by {gap:.2e} on average, more than "
            f"sync.max_log_prob_gap ({bound:.2e}); no update was made in this step. "
            "Look for a weight sync that failed, or set a larger bound."
        )
