"""What `debug.assertions` checks before an optimizer step, beside checksums of syncs and the sampler's log-probs."""

from exprl_megatron.errors import RunStopped


def check_first_update(stage: str, step: int, metrics: dict[str, float]) -> None:
    """Check before the first update of a step that the policy still is the old one, so that every ratio is 1.

    `kl/old` sums terms that are 0 there alone (k3). In a stage's first step the policy is the reference policy, and
    `kl/start` is 0 by the same argument. Both are compared exactly. Raises RunStopped.
    """
    zeros = {"kl/old": "the policy before the step"}
    if step == 1:
        zeros["kl/start"] = "the stage's reference policy"
    for name, other in zeros.items():
        value = metrics.get(name, 0.0)
        if value != 0:
            raise RunStopped(
                f"debug.assertions: in step {step} of {stage}, before any weight has changed, {name} is {value:.3e} "
                f"nats a token and not 0, so the same tokens have other log-probs under {other}; nothing was learned "
                "from this step. Look for kernels or batches that differ between scoring and learning."
            )
