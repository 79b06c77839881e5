"""Models that are converted and trained, but whose weights a run cannot put into its servers yet."""

from exprl_megatron.config.run import RunConfig
from exprl_megatron.models.architecture import Architecture


def unserved_violations(config: RunConfig, architecture: Architecture) -> list[str]:
    """The sentence for the user where a run needs servers of a model that they do not have."""
    if architecture.delta_net is None or not (config.needs_sampling_servers or config.has_ref_server):
        return []
    return [
        f"policy.model is {config.policy.model}, a {architecture.family} model with gated delta nets, whose weights a "
        f"run cannot put into its servers yet; train it in sft stages without evaluation, or choose another model."
    ]
