"""Bytes on each device, by kind: what a trainer's rank holds in each phase, and what a server holds."""

from dataclasses import dataclass, fields

from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, padded_vocabulary, stage_layers
from exprl_megatron.models.routing import Routing
from exprl_megatron.planning.activations import activation_bytes, value_bytes, working_bytes
from exprl_megatron.planning.hardware import GIB, Gpu
from exprl_megatron.planning.parameters import (
    ParameterCounts,
    largest_tensor,
    layer_counts,
    model_parameters,
    rank_counts,
)

CONTEXT = int(1.5 * GIB)
"""CUDA's context, cuBLAS's workspaces and the kernels of one process (assumed; nvidia-smi shows 1 to 2 GB)."""
GROUP = GIB // 4
"""Buffers of one NCCL communicator between several ranks (assumed; they grow with channels and peers)."""
USABLE = 0.95
"""Share of a device that a plan may fill: the rest is lost between blocks of the caching allocator (assumed)."""
TILE_BYTES, TILE_ROWS = 2**28, 4096
"""The tile of logits in policy/log_probs.py."""
CHUNKED_PREFILL = {False: 8192, True: 16384}
"""SGLang's default by whether the device has 160 GiB or more (sglang/srt/arg_groups/memory_hook.py)."""
GRAPHED_BATCH = 512
"""Largest batch for which SGLang captures a CUDA graph (same file)."""
GRAPH_BYTES = GRAPHED_BATCH * 2 * 2**20
"""Of all its CUDA graphs (same file)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by kind."""

    weights: float = 0
    fp8_copies: float = 0
    """Quantized weights that Transformer Engine keeps in addition to BF16 ones, as rows and as columns."""
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    kv_cache: float = 0
    communication: float = 0
    """NCCL's buffers, and the bucket in which weights travel to the servers."""
    workspace: float = 0
    """CUDA's context and libraries, what the layer that runs holds besides activations, a server's reserve."""
    asleep: float = 0
    """Where trainer and servers are colocated: what the other side holds meanwhile."""

    @property
    def total(self) -> float:
        """The sum of all parts, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def excess_bytes(self, gpu: Gpu) -> float:
        """Return the bytes by which they exceed what a plan may fill of `gpu`; negative where they fit."""
        return self.total - gpu.memory_bytes * USABLE


@dataclass(frozen=True)
class HostBytes:
    """Bytes that one trainer rank keeps in host memory."""

    ref_policy: float = 0
    optimizer: float = 0
    asleep: float = 0
    """Where trainer and servers are colocated: weights and optimizer while the servers sample."""

    @property
    def total(self) -> float:
        """The sum of all parts, in bytes."""
        return self.ref_policy + self.optimizer + self.asleep


def resident_memory(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, pp_rank: int, gpu: Gpu | None = None
) -> Memory:
    """Return the memory that a trainer rank holds in all phases of a stage."""
    counts = rank_counts(architecture, policy.layout, pp_rank)
    wide = value_bytes(policy.precision)
    eight = _fp8_linear(architecture, policy, pp_rank)
    copies = _fp8_bytes(policy, gpu)
    replaced = policy.precision.fp8_parameters
    return Memory(
        weights=wide * (counts.total - eight) + eight * copies if replaced else wide * counts.total,
        fp8_copies=0 if replaced else eight * copies,
        # Megatron's data parallelism sums in fp32.
        gradients=4.0 * counts.total,
        optimizer=optimizer_bytes(counts, policy, optimizer) * (1 - optimizer.offload),
        communication=GROUP * communicators(policy.layout),
        workspace=CONTEXT,
    )


def training_memory(
    architecture: Architecture,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    pp_rank: int,
    micro_batches: int,
    gpu: Gpu | None = None,
) -> Memory:
    """Return the peak of the training phase on a rank of stage `pp_rank` with `micro_batches` micro-batches for each of
    its ranks.
    """
    rest = resident_memory(architecture, policy, optimizer, pp_rank, gpu)
    last = pp_rank == policy.layout.pp - 1
    return _with_more(
        rest,
        activations=activation_bytes(architecture, policy, pp_rank, micro_batches),
        logits=logit_bytes(architecture, policy, backward=True) if last else 0,
        workspace=working_bytes(architecture, policy, backward=True) + _largest_gradient(architecture, policy, last),
    )


def log_prob_memory(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, pp_rank: int, gpu: Gpu | None = None
) -> Memory:
    """Return the peak of a forward pass without gradients; optimizer and gradient buffers stay in memory."""
    rest = resident_memory(architecture, policy, optimizer, pp_rank, gpu)
    last = pp_rank == policy.layout.pp - 1
    return _with_more(
        rest,
        logits=logit_bytes(architecture, policy, backward=False) if last else 0,
        workspace=working_bytes(architecture, policy, backward=False),
    )


def reshard_memory(
    architecture: Architecture,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    pp_rank: int,
    bucket_bytes: float,
    gpu: Gpu | None = None,
) -> Memory:
    """Return the peak while weights are gathered: a bucket and the shards that it is made of.

    A tensor is never cut, so the largest one may be more than a bucket.
    """
    rest = resident_memory(architecture, policy, optimizer, pp_rank, gpu)
    largest = largest_tensor(architecture) * value_bytes(policy.precision)
    return _with_more(rest, communication=2 * max(bucket_bytes, largest))


def host_memory(
    architecture: Architecture,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    pp_rank: int,
    keeps_ref_policy: bool,
    colocated: bool = False,
) -> HostBytes:
    """Return what a trainer's rank keeps in host memory.

    That is the reference policy's weights, and the current ones while it is scored; the offloaded share of the
    optimizer; and what is offloaded while colocated servers sample. Weights are offloaded to the same place in both
    cases.
    """
    counts = rank_counts(architecture, policy.layout, pp_rank)
    kept = keeps_ref_policy and policy.ref_policy == "host"
    weights, state = value_bytes(policy.precision) * counts.total, optimizer_bytes(counts, policy, optimizer)
    return HostBytes(
        ref_policy=2 * weights if kept else 0,
        optimizer=state * optimizer.offload,
        asleep=(0 if kept else weights) + state * (1 - optimizer.offload) if colocated else 0,
    )


def routed_experts_bytes(architecture: Architecture, config: RunConfig, tokens: float) -> float:
    """Return the bytes of rank 0's host memory for the experts that servers chose for `tokens` (router replay)."""
    routing = Routing.of(architecture)
    if routing is None or config.policy.router_replay is False or config.server.router:
        return 0.0
    return tokens * routing.token_bytes


def optimizer_bytes(counts: ParameterCounts, policy: PolicyConfig, optimizer: OptimizerConfig) -> float:
    """Return AdamW's two fp32 moments and, unless parameters are fp32, an fp32 copy of them; sharded where
    distributed.
    """
    layout = policy.layout
    each = 8 if policy.precision.dtype == "fp32" else 12
    if not optimizer.distributed:
        return each * counts.total
    return each * (counts.dense / (layout.dp * layout.cp) + counts.experts / layout.edp)


def logit_bytes(architecture: Architecture, policy: PolicyConfig, backward: bool) -> float:
    """Output layer, log-probs and entropy together: a tile of logits, the hidden states' copies, backward their
    gradient in fp32 and the weight's (policy/log_probs.py)."""
    layout = policy.layout
    wide = value_bytes(policy.precision)
    rows = padded_vocabulary(architecture, layout.tp) // layout.tp
    tile = policy.log_prob_chunk * min(rows, TILE_ROWS) * (8 + wide) if policy.log_prob_chunk else TILE_BYTES
    states = policy.micro_batch_tokens / layout.cp * architecture.hidden
    if not backward:
        return tile + 2 * wide * states
    gradient = rows * architecture.hidden * wide + min(rows, TILE_ROWS) * architecture.hidden * 4
    return tile + (4 + 3 * wide) * states + gradient


def server_memory(
    architecture: Architecture, server: ServerConfig, gpu: Gpu, bucket_bytes: float = 0, weight_bytes: float = 2
) -> Memory:
    """Return the memory of a device of an SGLang server: weights, the KV cache that fills what SGLang leaves, its
    reserve for activations and graphs (sglang/srt/arg_groups/memory_hook.py), and a bucket of arriving weights.

    Weights and cache fill `server.memory_share` of the device, or all but the reserve where that is not set.

    Raises:
        UserError: not even the weights fit.
    """
    weights = model_parameters(architecture) * weight_bytes / server.tp
    large = gpu.memory_bytes >= 160 * GIB
    reserve = max(0.5 * GIB + 1.5 * CHUNKED_PREFILL[large] * 2**20 + GRAPH_BYTES + server.tp / 8 * GIB, 10 * GIB)
    share = server.memory_share
    free = (gpu.memory_bytes - reserve if share is None else gpu.memory_bytes * share) - weights
    if free <= bucket_bytes:
        short = (bucket_bytes - free) / GIB
        raise UserError(
            f"A server with tp {server.tp} needs {short:.1f} GiB more than a {gpu.name} has, for weights and reserve "
            "alone; raise its tp."
            if share is None
            else f"A server with tp {server.tp} needs {short:.1f} GiB more than server.mem_fraction_static "
            f"({share:g}) of a {gpu.name}, for weights alone; raise either."
        )
    if server.max_total_tokens is not None:
        free = min(free, server.max_total_tokens * kv_bytes_per_token(architecture, server.tp))
    return Memory(weights=weights, kv_cache=free - bucket_bytes, communication=bucket_bytes, workspace=reserve)


def kv_bytes_per_token(architecture: Architecture, tp: int, value: int = 2) -> float:
    """Return a device's part of one token's keys and values; with more devices than groups each holds one group.

    Gated delta nets keep none.
    """
    groups = max(1.0, architecture.kv_groups / tp)
    return 2 * architecture.attention_layers * groups * architecture.head_dim * value


def _with_more(memory: Memory, **extra: float) -> Memory:
    values = {field.name: getattr(memory, field.name) + extra.get(field.name, 0) for field in fields(Memory)}
    return Memory(**values)


def _fp8_linear(architecture: Architecture, policy: PolicyConfig, pp_rank: int) -> int:
    """Return the parameters of the rank whose products run in FP8."""
    if not policy.precision.fp8 or policy.precision.emulate:
        return 0
    ends = policy.precision.first_last_bf16
    inner = range(ends, architecture.layers - ends)
    layers = [n for chunk in stage_layers(architecture, policy.layout)[pp_rank] for n in chunk if n in inner]
    each = {kind: layer_counts(kind, policy.layout) for kind in architecture.kinds(layers)}
    return sum(count * (each[k].linear + each[k].experts) for k, count in architecture.kinds(layers).items())


def _fp8_bytes(policy: PolicyConfig, gpu: Gpu | None) -> float:
    """Return the bytes of a quantized weight: as rows and as columns, where the tensor core cannot read columns of
    rows.
    """
    if policy.precision.kind == "mxfp8":
        return 2 + 2 / 32
    one_copy = gpu is not None and gpu.blackwell and policy.precision.kind != "fp8-blockwise"
    return 1 if one_copy else 2


def communicators(layout: Layout) -> int:
    """Return the NCCL communicators of a rank: one for each way in which its layout has several ranks, and the
    world's.
    """
    sizes = (layout.tp, layout.cp, layout.dp * layout.cp, layout.pp, layout.ep, layout.etp, layout.world_size)
    return sum(size > 1 for size in sizes)


def _largest_gradient(architecture: Architecture, policy: PolicyConfig, last: bool) -> float:
    """Return one weight's gradient in the model's own format, before it is added to the fp32 sum."""
    layout = policy.layout
    widest = max(_mlp_width(kind, layout) for kind in architecture.kinds())
    matrix = 2 * architecture.hidden * widest
    vocabulary = padded_vocabulary(architecture, layout.tp) / layout.tp * architecture.hidden
    # The output layer's is counted with the logits; the embedding's comes when activations are gone.
    return value_bytes(policy.precision) * (matrix if last else max(matrix, vocabulary if layout.pp == 1 else matrix))


def _mlp_width(architecture: Architecture, layout: Layout) -> float:
    """Return the columns of a rank's widest MLP in a layer."""
    experts = architecture.experts
    if experts is None:
        return architecture.ffn / layout.tp
    return max(experts.ffn / layout.etp, experts.shared_ffn / layout.tp)
