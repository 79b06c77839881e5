"""Stops a run whose trainer and sampler no longer agree about the same tokens."""

from exprl_megatron.errors import RunStopped


def check_log_prob_gap(metrics: dict[str, float], bound: float | None) -> None:
    """Raise RunStopped where `sampler_gap/mean` (nats a token) exceeds `bound`."""
    gap = metrics.get("sampler_gap/mean")
    if bound is not None and gap is not None and not gap <= bound:  # not a number is no agreement
        raise RunStopped(
            f"Trainer and sampler log-probs of the same tokens differ by {gap:.2e} on average, more than "
            f"sync.max_log_prob_gap ({bound:.2e}); nothing was learned from this step. "
            "Look for a weight sync that failed, or raise the bound."
        )
