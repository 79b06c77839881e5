"""Checks of `debug.assertions` before an optimizer step, in addition to sync checksums and the sampler's log-probs."""

from dataclasses import dataclass

from exprl_megatron.errors import RunStopped


def check_first_update(stage: str, step: int, metrics: dict[str, float], replays_routing: bool = False) -> None:
    """Check before the first update of a step that the policy equals the old policy, so that every ratio is 1.

    `kl/old` sums terms (k3) that are 0 only there. In a stage's first step the policy is the reference policy, and
    `kl/ref` is 0 for the same reason, unless the policy `replays_routing`, since the reference policy's routers make
    their own choice. Both are compared exactly.

    Raises:
        RunStopped: one of the two is not 0.
    """
    zeros = {"kl/old": "the policy before the step"}
    if step == 1 and not replays_routing:
        zeros["kl/ref"] = "the stage's reference policy"
    for name, other in zeros.items():
        value = metrics.get(name, 0.0)
        if value != 0:
            raise RunStopped(
                f"debug.assertions: in step {step} of {stage}, before any weight has changed, {name} is {value:.3e} "
                f"nats per token and not 0, so the same tokens have other log-probs under {other}; no update was made "
                "in this step. Look for kernels or batches that differ between scoring and learning."
            )


@dataclass
class AssertionCounts:
    """Counts of the comparisons since the start of this command, for the sentence at its end."""

    syncs: int = 0
    """Weight syncs whose checksums were compared."""
    gaps: int = 0
    """Updates before which log-probs of trainer and sampler were compared."""
    largest_gap: float = 0.0
    """The largest mean gap of an update, in nats per token."""
    first_updates: int = 0
    """Updates before which `kl/old` had to be 0."""
    stage_starts: int = 0
    """Updates before which `kl/ref` had to be 0."""

    def synced(self, metrics: dict[str, float]) -> None:
        """Count a sync by its metrics; a sync that had nothing to do has no metrics."""
        self.syncs += bool(metrics)

    def updated(self, step: int, metrics: dict[str, float], first_in_step: bool, replays_routing: bool = False) -> None:
        """Count the comparisons before an update in `step` of its stage."""
        if (gap := metrics.get("sampler_gap/mean")) is not None:
            self.gaps += 1
            self.largest_gap = max(self.largest_gap, gap)
        if first_in_step:
            self.first_updates += "kl/old" in metrics
            self.stage_starts += step == 1 and "kl/ref" in metrics and not replays_routing

    def sentence(self) -> str:
        """Return the counts in one sentence."""
        return (
            f"debug.assertions: nothing differed in {self.syncs} weight syncs (checksums of every tensor), before "
            f"{self.gaps} updates (log-probs of trainer and sampler, at most {self.largest_gap:.1e} nats apart), in "
            f"{self.first_updates} first updates of a step (kl/old exactly 0) and {self.stage_starts} of a stage "
            "(kl/ref exactly 0)."
        )
