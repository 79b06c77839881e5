"""Bytes that a forward pass leaves for the backward pass, by the formulas of docs/scaling.md.

Korthikanti et al. (arXiv 2205.05198) count them for LayerNorm, GELU, dropout and attention with its matrix of scores;
here the layer has RMSNorm, SwiGLU or experts, grouped queries, no dropout, and attention keeps no matrix (its queries,
keys, values, output and one fp32 number per token and head).
"""

from itertools import chain

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.architecture import Architecture, stage_layers
from exprl_megatron.models.delta_net import CHUNK, DeltaNet


def layer_bytes_per_token(architecture: Architecture, layout: Layout, precision: PrecisionConfig) -> float:
    """Return the bytes of activations that one layer keeps for each token of the rank, without recomputation.

    A linear layer keeps its input, in FP8 quantized; a norm keeps its input as it is.
    """
    wide = value_bytes(precision)
    entry = 1 if precision.fp8 else wide
    sp = layout.tp if layout.sequence_parallel else 1
    hidden, queries = architecture.hidden, architecture.heads * architecture.head_dim
    keys = architecture.kv_groups * architecture.head_dim
    # Both norms keep their inputs, and their outputs as the next product's input.
    kept = (2 * wide + 2 * entry) * hidden / sp
    # Queries, keys, values and output of attention, the last of which the projection quantizes once more.
    attention: float = wide * (2 * queries + 2 * keys) + (queries if precision.fp8 else 0) + 4 * architecture.heads
    if architecture.qk_norm:
        attention += wide * (queries + keys)
    if architecture.output_gate:
        # The gate, and the output before it.
        attention += wide * 2 * queries
    if architecture.delta_net is not None:
        attention = _delta_net(architecture.delta_net, wide)
    kept += attention / layout.tp
    return kept + _mlp(architecture, layout, wide, entry)


def _delta_net(net: DeltaNet, wide: int) -> float:
    """Return what a gated delta net keeps between its projections in flash-linear-attention.

    The projection's output, the convolution's, keys and queries repeated to the value heads, values, decay and beta,
    the triangular system's rows, the output, and what its norm and gate give.
    """
    heads = 2 * net.value_heads * net.key_dim + net.value_heads * CHUNK
    return wide * (net.projected + net.convolved + heads + 3 * net.values) + 8 * net.value_heads


def _mlp(architecture: Architecture, layout: Layout, wide: int, entry: int) -> float:
    """Return SwiGLU's doubled input and its output; before experts their tokens' copies, the router's fp32 scores.

    The shared expert's input is the router's.
    """
    experts = architecture.experts
    if experts is None:
        return (2 * wide + entry) * architecture.ffn / layout.tp
    copies = experts.top_k * layout.etp / layout.tp
    ffn = experts.ffn / layout.etp
    # The norm's output stays as it is for the router in addition to its quantized copies.
    norm = (wide - entry) * architecture.hidden / layout.tp
    shared = (2 * wide + entry) * experts.shared_ffn / layout.tp
    routed = copies * (entry * architecture.hidden + (2 * wide + entry) * ffn)
    return routed + shared + 8 * experts.count / layout.tp + norm


def activation_bytes(
    architecture: Architecture, policy: PolicyConfig, pp_rank: int, micro_batches: int, layout: Layout | None = None
) -> float:
    """Return the most that a rank of stage `pp_rank` keeps at once of all micro-batches in flight."""
    layout = layout or policy.layout
    tokens = policy.micro_batch_tokens / layout.cp
    wide = value_bytes(policy.precision)
    sp = layout.tp if layout.sequence_parallel else 1
    kinds = architecture.kinds(chain(*stage_layers(architecture, layout)[pp_rank]))
    each = {kind: layer_bytes_per_token(kind, layout, policy.precision) for kind in kinds}
    # A chunk has 1 / vpp of the rank's layers.
    flying = chunks_in_flight(layout, pp_rank, micro_batches) / layout.vpp
    if policy.recompute == "full":
        # The rank keeps each layer's input, and all of the one layer whose backward pass runs.
        kept = flying * sum(kinds.values()) * wide * architecture.hidden / sp + max(each.values())
    else:
        statistics = 4 * architecture.heads / layout.tp if policy.recompute == "selective" else 0
        kept = flying * sum(count * (each[kind] - statistics) for kind, count in kinds.items())
    if pp_rank == layout.pp - 1:
        # The final norm keeps its input and output.
        kept += 2 * wide * architecture.hidden / sp
    return tokens * kept


def chunks_in_flight(layout: Layout, pp_rank: int, micro_batches: int) -> int:
    """Return the most forward passes of one chunk whose backward pass has not run.

    One-forward-one-backward: pp - rank. Interleaved: 2 (pp - rank - 1) + (vpp - 1) pp to warm up, and one more
    (Narayanan et al., arXiv 2104.04473; megatron.core.pipeline_parallel.schedules).
    """
    if layout.vpp == 1:
        return min(layout.pp - pp_rank, micro_batches)
    warm_up = 2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.vpp)


def working_bytes(architecture: Architecture, policy: PolicyConfig, backward: bool) -> float:
    """Return the additional bytes of the running layer: its gathered input, the widest intermediates, their gradients.

    Sequence parallelism gathers the input again for the weight's gradient.
    """
    layout = policy.layout
    tokens = policy.micro_batch_tokens / layout.cp
    wide = value_bytes(policy.precision)
    gathered = (2 if backward else 1) * architecture.hidden
    return tokens * wide * (gathered + max(_widest(kind, layout) for kind in architecture.kinds()))


def _widest(architecture: Architecture, layout: Layout) -> float:
    """Return the numbers for each token in the intermediates of a layer's MLP, the shared expert's output while others
    run.
    """
    experts, hidden = architecture.experts, architecture.hidden
    if experts is None:
        return hidden + 3 * architecture.ffn / layout.tp
    routed = experts.top_k * layout.etp / layout.tp * (hidden + 3 * experts.ffn / layout.etp)
    if not experts.shared_ffn:
        return routed
    return hidden + max(routed, 3 * experts.shared_ffn / layout.tp)


def value_bytes(precision: PrecisionConfig) -> int:
    """Return the bytes of an activation or parameter outside FP8 products."""
    return 4 if precision.dtype == "fp32" else 2
