"""Seconds of a training step, and of a pass for log-probs, from the layout: docs/time_model.md explains each term."""

from dataclasses import dataclass, fields, replace
from itertools import chain
from math import ceil

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, stage_layers
from exprl_megatron.models.flops import head_gemm, linear_parameters, model_flops
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.kernels import gemm_seconds, hbm_seconds, host_optimizer_seconds
from exprl_megatron.planning.layer_time import NO_TIME, LayerTime, RankWorkload, backward_layer, forward_layer
from exprl_megatron.planning.links import exposed_seconds, ring_seconds, send_seconds
from exprl_megatron.planning.trainer_features import THIS_TRAINER, TrainerFeatures


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of one optimizer step on the slowest pipeline rank, by cause; of transfers only what nothing hides."""

    gemm_s: float
    attention_s: float
    tp_comm_s: float
    cp_comm_s: float
    ep_comm_s: float
    pp_s: float
    """Bubble and sends."""
    dp_comm_s: float
    recompute_s: float
    head_s: float
    memory_bound_s: float
    """Norms, activations, casts, permutations."""
    optimizer_s: float
    tokens: int
    """Global tokens of the step."""
    gpus: int
    flops: float
    """Operations that the model needs for them, attention causal, nothing recomputed."""
    peak_name: str
    peak_flops: float

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name.endswith("_s"))

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Throughput."""
        return self.tokens / self.total_s / self.gpus

    @property
    def mfu(self) -> float:
        """Share of `peak_name` that the model's own operations take."""
        return self.flops / self.total_s / self.gpus / self.peak_flops


def training_time(
    architecture: Architecture,
    layout: Layout,
    *,
    precision: PrecisionConfig,
    recompute: str,
    sequence_length: int,
    global_tokens: int,
    micro_batch_tokens: int,
    gpu: Gpu,
    features: TrainerFeatures = THIS_TRAINER,
) -> TrainingTime:
    """Return the seconds of one optimizer step over `global_tokens` tokens in sequences of `sequence_length`.

    `micro_batch_tokens` is the most that one data-parallel rank takes at a time, shared by its context-parallel
    ranks; tokens are spread evenly. Raises UserError for a precision that the GPU's tensor cores do not run.

    More than 7 parameters: they are the variables of the formula.
    """
    check_precision(precision, gpu)
    batches = micro_batches(layout, global_tokens, micro_batch_tokens)
    tokens = global_tokens / (batches * layout.dp * layout.cp)
    rank = RankWorkload(architecture, layout, precision, sequence_length, tokens, gpu, features)
    stage = _slowest_stage(rank, _head(rank, True), recompute)
    stage_backward = stage.backward.total + stage.again
    flops = model_flops(architecture, sequence_length) * global_tokens
    time = _passes_time(rank, stage, stage.forward + stage.backward, batches, global_tokens, flops)
    return replace(
        time,
        pp_s=_pipeline(rank, stage.forward.total, stage_backward, batches),
        dp_comm_s=_data_parallel(rank, stage.layers, stage.forward.total, stage_backward, batches),
        recompute_s=stage.again * batches,
        optimizer_s=_optimizer(rank, stage.layers),
    )


def log_prob_time(
    architecture: Architecture,
    layout: Layout,
    *,
    precision: PrecisionConfig,
    sequence_length: int,
    global_tokens: int,
    micro_batch_tokens: int,
    gpu: Gpu,
    features: TrainerFeatures = THIS_TRAINER,
) -> TrainingTime:
    """Return the seconds of one forward pass over `global_tokens` tokens, as `training_time` without backward and
    optimizer.

    More than 7 parameters: they are the variables of the formula.
    """
    check_precision(precision, gpu)
    batches = micro_batches(layout, global_tokens, micro_batch_tokens)
    tokens = global_tokens / (batches * layout.dp * layout.cp)
    rank = RankWorkload(architecture, layout, precision, sequence_length, tokens, gpu, features)
    stage = _slowest_stage(rank, _head(rank, False))
    flops = model_flops(architecture, sequence_length, training=False) * global_tokens
    return _passes_time(rank, stage, stage.forward, batches, global_tokens, flops)


def _passes_time(
    rank: RankWorkload, stage: "_Stage", layers: LayerTime, batches: int, global_tokens: int, flops: float
) -> TrainingTime:
    """Return the seconds of `batches` micro-batches, each of which takes `layers` and the head; pipelined forward.

    `flops` are the model's own operations for `global_tokens` tokens.
    """
    every = layers * batches
    peak_name, peak = rank.gpu.peak(rank.precision.kind)
    return TrainingTime(
        gemm_s=every.gemm,
        attention_s=every.attention,
        tp_comm_s=every.tp,
        cp_comm_s=every.cp,
        ep_comm_s=every.ep,
        pp_s=_pipeline(rank, stage.forward.total, 0.0, batches),
        dp_comm_s=0.0,
        recompute_s=0.0,
        head_s=stage.head * batches,
        memory_bound_s=every.memory,
        optimizer_s=0.0,
        tokens=global_tokens,
        gpus=rank.layout.world_size,
        flops=flops,
        peak_name=peak_name,
        peak_flops=peak,
    )


def micro_batches(layout: Layout, global_tokens: float, micro_batch_tokens: int) -> int:
    """Return the micro-batches of each data-parallel rank; with virtual stages, a multiple of the pipeline's ranks."""
    group = layout.pp if layout.vpp > 1 else 1
    return max(1, ceil(global_tokens / (micro_batch_tokens * layout.dp * group))) * group


def check_precision(precision: PrecisionConfig, gpu: Gpu) -> None:
    """Check that `gpu` supports the precision.

    Raises:
        UserError: it is an FP8 kind that the GPU does not support.
    """
    if precision.fp8 and precision.kind not in gpu.fp8_kinds:
        raise UserError(
            f"policy.precision is {precision.kind}, which {gpu.name} does not run; use bf16 or one of "
            f"{', '.join(sorted(gpu.fp8_kinds))}."
        )


def _recomputed(forward: LayerTime, recompute: str, rank: RankWorkload) -> float:
    """Return the seconds a layer's backward pass spends on computing the forward pass again."""
    if recompute == "selective":
        return forward.attention
    return forward.total * (rank.features.recomputed_share if recompute == "full" else 0.0)


@dataclass(frozen=True)
class _Stage:
    """Seconds of one micro-batch in all layers of a pipeline rank."""

    layers: list[int]
    forward: LayerTime
    backward: LayerTime
    again: float
    head: float
    """Of the output layer, where it is there."""

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.again + self.head


def _slowest_stage(rank: RankWorkload, head: float, recompute: str | None = None) -> _Stage:
    """Return the pipeline rank that the others wait for, the last one of equals; `recompute` None: only the forward
    pass.
    """
    layout, costs = rank.layout, {}
    for kind in rank.architecture.kinds():
        alike = replace(rank, architecture=kind)
        forward = forward_layer(alike)
        backward, again = NO_TIME, 0.0
        if recompute is not None:
            backward, again = backward_layer(alike), _recomputed(forward, recompute, alike)
        costs[kind] = forward, backward, again
    stages = []
    for pp_rank, chunks in enumerate(stage_layers(rank.architecture, layout)):
        layers = list(chain(*chunks))
        forward, backward, again = NO_TIME, NO_TIME, 0.0
        for kind, count in rank.architecture.kinds(layers).items():
            one = costs[kind]
            forward, backward, again = forward + one[0] * count, backward + one[1] * count, again + one[2] * count
        stages.append(_Stage(layers, forward, backward, again, head if pp_rank == layout.pp - 1 else 0.0))
    return max(reversed(stages), key=lambda stage: stage.total)


def _head(rank: RankWorkload, training: bool) -> float:
    """Return the seconds of the output layer and the loss for one micro-batch: BF16, vocabulary over tp, logits never
    whole.

    Bytes per logit: the fused loss reads BF16 twice and writes its gradient; the chain reads and writes fp32 for
    the cast, maximum, difference, exponential, sum and division, and again for the gradient and its cast.
    """
    gemm = head_gemm(rank.architecture, rank.tokens, rank.layout.tp)
    softmax, derivative = (6.0, 4.0) if rank.features.fused_loss else (28.0, 14.0)
    forward = gemm_seconds(gemm, rank.gpu, rank.kind) + hbm_seconds(gemm.m * gemm.n * softmax, rank.gpu)
    if not training:
        return forward
    gradient = gemm_seconds(gemm.input_gradient(), rank.gpu, rank.kind)
    gradient += hbm_seconds(gemm.m * gemm.n * derivative, rank.gpu)
    if not rank.features.lora:
        gradient += gemm_seconds(
            gemm.weight_gradient(), rank.gpu, rank.kind, output_bytes=2 * rank.features.gradient_bytes
        )
    return forward * (2 if rank.features.head_recomputed else 1) + gradient


def _pipeline(rank: RankWorkload, forward: float, backward: float, batches: int) -> float:
    """Return the seconds of the bubble of the (interleaved) one-forward-one-backward schedule, (pp - 1) / vpp
    micro-batches, and the sends.

    Narayanan et al. 2021 (arXiv 2104.04473), section 2.2. Interleaved sends overlap with computation.
    """
    layout = rank.layout
    if layout.pp == 1:
        return 0.0
    width = rank.tokens / (layout.tp if layout.sequence_parallel else 1)
    send = send_seconds(width * rank.architecture.hidden * rank.width, rank.gpu, layout.tp * layout.cp * layout.dp)
    ways = 2 if backward else 1
    compute_s = (forward + backward) / (layout.vpp * ways)
    sends = exposed_seconds(send, compute_s, layout.vpp > 1) * layout.vpp * ways
    return (layout.pp - 1) / layout.vpp * (forward + backward) + sends * (batches + layout.pp - 1)


def _parameters(rank: RankWorkload, layers: list[int]) -> tuple[float, float]:
    """Return the parameters on this rank: (sharded over dp x cp, sharded over the experts' data parallelism)."""
    layout, architecture = rank.layout, rank.architecture
    dense, experts = linear_parameters(architecture, layers)
    vocabulary = architecture.vocabulary * architecture.hidden * (1 if layout.pp > 1 or architecture.tied else 2)
    return (dense + vocabulary) / layout.tp, experts / (layout.ep * layout.etp)


def _data_parallel(rank: RankWorkload, layers: list[int], forward: float, backward: float, batches: int) -> float:
    """Return the seconds of the exposed reduction of gradients and gathering of parameters; with FSDP once and twice
    for each micro-batch.
    """
    layout, gpu, features = rank.layout, rank.gpu, rank.features
    if features.lora:
        return 0.0
    kept = 1.0 if rank.precision.fp8_parameters else rank.width
    total = 0.0
    for count, size, stride in zip(
        _parameters(rank, layers),
        (layout.dp * layout.cp, layout.edp),
        (layout.tp, layout.etp * layout.ep),
        strict=True,
    ):
        reduced = ring_seconds(count * features.gradient_bytes, gpu, size, stride)
        gathered = ring_seconds(count * kept, gpu, size, stride)
        if features.fsdp:
            total += batches * exposed_seconds(gathered, forward, True)
            total += batches * exposed_seconds(gathered + reduced, backward, True)
            continue
        for transfer, compute_s in ((reduced, backward), (gathered, forward)):
            total += exposed_seconds(transfer, compute_s / layout.vpp, features.dp_overlap)
    return total


def _optimizer(rank: RankWorkload, layers: list[int]) -> float:
    """Return the seconds of Adam's pass over its shard: fp32 weight and two moments in and out, gradient read
    twice, BF16 out.
    """
    if rank.features.lora:
        return 0.0
    dense, experts = _parameters(rank, layers)
    shard = dense / (rank.layout.dp * rank.layout.cp) + experts / rank.layout.edp
    here = shard * (1 - rank.features.offload) * (24 + 2 * rank.features.gradient_bytes + 2)
    there = shard * rank.features.offload
    return hbm_seconds(here, rank.gpu) + host_optimizer_seconds(there, rank.features.gradient_bytes, rank.gpu)
