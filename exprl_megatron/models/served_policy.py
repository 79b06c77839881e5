"""What of a run SGLang cannot do with its policy."""

from collections.abc import Iterator

from exprl_megatron.config.run import RunConfig
from exprl_megatron.models.architecture import Architecture


def served_violations(config: RunConfig, architecture: Architecture) -> Iterator[str]:
    """Yield one sentence for each setting of `server` and `sync` with which the policy cannot be served."""
    if not (config.needs_sampling_servers or config.has_ref_server):
        return
    tp, model, net = config.server.tp, config.policy.model, architecture.delta_net
    if architecture.post_norms and tp > architecture.kv_groups:
        yield (
            f"server.tp is {tp}, more than the {architecture.kv_groups} KV groups of {model}, and SGLang cannot divide "
            f"this {architecture.family} model further; lower it."
        )
    if net is None:
        return
    for heads, count in (("key", net.key_heads), ("value", net.value_heads)):
        if count % tp:
            yield (
                f"server.tp is {tp}, which does not divide the {count} {heads} heads of the gated delta nets of "
                f"{model}; use a divisor of {count}."
            )
    if config.sync.fp8:
        yield (
            f"sync.fp8 is true, but gated delta nets, as {model} has them, are not quantized for servers; set it to "
            f"false."
        )
