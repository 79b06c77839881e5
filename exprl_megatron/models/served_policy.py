"""What of a run SGLang cannot do with its policy, and which models it cannot divide over the ranks of a server."""

from collections.abc import Iterator

from exprl_megatron.config.run import RunConfig
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.fp8_blocks import BLOCK


def served_violations(config: RunConfig, architecture: Architecture, cuda: bool) -> Iterator[str]:
    """Yield one sentence for each setting of `server` and `sync` with which the policy cannot be served on CUDA, or on
    a CPU.
    """
    if not (config.needs_sampling_servers or config.has_ref_server):
        return
    tp, model = config.server.tp, config.policy.model
    if not config.server.divides_otherwise:
        for fault in division_faults(architecture, tp, model, cuda):
            yield f"server.tp is {tp}, which {fault}"
    if config.sync.fp8:
        for fault in block_faults(architecture, tp, model):
            yield f"sync.fp8 is true, but {fault}"


def division_faults(architecture: Architecture, tp: int, model: str, cuda: bool) -> Iterator[str]:
    """Yield the rest of a sentence, behind `tp ... which`, for each part of `model` that SGLang 0.5.23 cannot divide.

    A CUDA server would stop at its start. On a CPU SGLang fills up with zeros what does not divide, and computes some
    families wrongly then (see sharding.py): Mixtral with heads of another size, Olmo 3 with norms over the zeros too.
    """
    groups = architecture.kv_groups
    whole_groups = architecture.post_norms or (architecture.family == "mixtral" and not cuda)
    if whole_groups and groups % tp:
        yield (
            f"does not divide the {groups} KV groups of {model}, and SGLang cannot divide this {architecture.family} "
            f"model{'' if cuda else ' on a CPU'} otherwise; use a divisor of {groups}."
        )
    elif cuda and max(groups, tp) % min(groups, tp):
        yield f"neither divides the {groups} KV groups of {model} nor is a multiple of them; change it."
    parts = _columns(architecture) if cuda else []
    if (net := architecture.delta_net) is not None:
        parts += [
            ("key heads of the gated delta nets", net.key_heads),
            ("value heads of the gated delta nets", net.value_heads),
        ]
    for what, count in parts:
        if count % tp:
            yield f"does not divide the {count} {what} of {model}; use a divisor of {count}."


def block_faults(architecture: Architecture, tp: int, model: str) -> Iterator[str]:
    """Yield the rest of a sentence for each reason why servers of `tp` ranks cannot hold `model` in FP8 blocks.

    A server joins query, key and value, and gate and up: each rank's part of each of them is whole blocks (SGLang's
    Fp8LinearMethod and Fp8MoEMethod).
    """
    if architecture.delta_net is not None:
        yield f"gated delta nets, as {model} has them, are not quantized for servers; set it to false."
        return
    size = architecture.head_dim
    attention = [("query's rows", architecture.heads * size), ("key's rows", max(architecture.kv_groups, tp) * size)]
    for what, count in (*attention, *_columns(architecture)[1:]):
        if count / tp % BLOCK:
            yield (
                f"{tp} ranks (server.tp) have {count / tp:g} each of the {count} {what} of {model}, no multiple of an "
                f"FP8 block's {BLOCK}; lower server.tp, or set it to false."
            )


def _columns(architecture: Architecture) -> list[tuple[str, int]]:
    """Return the parts that a CUDA server divides equally, and how many there are of each."""
    found = [("attention heads", architecture.heads)]
    for kind in architecture.kinds():
        if (experts := kind.experts) is None:
            found.append(("MLP columns", architecture.ffn))
        else:
            found += [("columns of an expert", experts.ffn), ("columns of the shared expert", experts.shared_ffn)]
    return list(dict.fromkeys(found))
