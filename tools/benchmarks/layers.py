"""Forward and backward of a published model's own layers, a few of them, with random weights on the device at hand."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.peak_memory import extra_bytes
from benchmarks.plain_step import weighted_loss
from benchmarks.step_comparison import make_sequences
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig, PrecisionKind
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.policy.model import build_chunks
from exprl_megatron.policy.packing import plan_micro_batches, shape_of
from exprl_megatron.policy.step import MicroBatches, forward_backward
from exprl_megatron.policy.world import World
from exprl_megatron.utils.accelerator import uses_cuda


@dataclass(frozen=True)
class Work:
    """What every precision computes."""

    architecture: Architecture
    """With as many layers as are built."""
    shallow: int
    """Layers of the second, shallower measurement, from which the time of one layer is known."""
    sequence_length: int
    sequences: int
    """In the one micro-batch."""

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.sequence_length * self.sequences


@dataclass(frozen=True)
class LayerFigures:
    """Seconds of forward and backward over the micro-batch, one entry a round; bytes on the device."""

    precision: PrecisionKind
    deep_s: tuple[float, ...]
    shallow_s: tuple[float, ...]
    peak_bytes: int
    """Most of the device's memory that tensors of this precision take during a step, weights and gradients included."""

    def seconds(self, work: Work, layers: int) -> tuple[float, ...]:
        """Return what as many layers with embedding and output layer would take, for each round."""
        return tuple(
            deep + (layers - work.architecture.layers) * per_layer(deep, shallow, work)
            for deep, shallow in zip(self.deep_s, self.shallow_s, strict=True)
        )

    def extrapolates(self, work: Work) -> bool:
        """Return whether the deeper model took longer in every round; where noise hides that, no other depth is
        inferred.
        """
        pairs = zip(self.deep_s, self.shallow_s, strict=True)
        return all(per_layer(deep, shallow, work) > 0 for deep, shallow in pairs)


def per_layer(deep: float, shallow: float, work: Work) -> float:
    """Return seconds of one layer: what the deeper model takes longer, by the layers that it has more."""
    return (deep - shallow) / (work.architecture.layers - work.shallow)


def narrowed(architecture: Architecture, factor: int, tp: int) -> Architecture:
    """Return the same family with every width divided by `factor`, but heads of the same size."""
    if architecture.experts is not None:
        raise UserError("The benchmark of layers knows dense models alone; choose another model.")
    groups = max(tp, architecture.kv_groups // factor)
    return replace(
        architecture,
        hidden=architecture.hidden // factor,
        heads=max(groups, architecture.heads // factor),
        kv_groups=groups,
        ffn=architecture.ffn // factor,
        vocabulary=architecture.vocabulary // factor,
    )


def policy_config(work: Work, kind: PrecisionKind, tp: int) -> PolicyConfig:
    """Return what a precision is measured with."""
    return PolicyConfig(
        model="random",
        layout=Layout(tp=tp, sequence_parallel=tp > 1),
        precision=PrecisionConfig(kind=kind),
        max_tokens=work.sequence_length,
        micro_batch_tokens=work.tokens,
        # There are no buffers to add to here.
        gradient_accumulation_fusion=False,
    )


def measure_layers(work: Work, kinds: list[PrecisionKind], tp: int, rounds: int, world: World) -> list[LayerFigures]:
    """Return figures of each precision; they take turns within every round, after two steps of each to warm up.

    All weights are held at the same time, gradients of one precision at a time: those are the ordinary ones in the
    parameters' format, not Megatron's fp32 buffers.
    """
    models = []
    peaks = []
    for kind in kinds:
        before = _allocated()
        chunk, step = _model(work, kind, tp, world)
        _timed(chunk, step)
        # FP8 kinds keep copies of their weights in 8 bits from the first step on.
        held = max(_weights(chunk), _allocated() - before)
        peaks.append(held + extra_bytes(step))
        _drop_gradients(chunk)
        models.append((chunk, step))
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in kinds]
    for _ in range(rounds):
        for (chunk, step), (deep, shallow) in zip(models, seconds, strict=True):
            deep.append(_timed(chunk, step))
            shallow.append(_timed(chunk, step, work.shallow))
    return [
        LayerFigures(kind, tuple(deep), tuple(shallow), peak)
        for kind, (deep, shallow), peak in zip(kinds, seconds, peaks, strict=True)
    ]


def speedups(slow: LayerFigures, fast: LayerFigures, work: Work, layers: int) -> tuple[float, float, float]:
    """Median, lowest and highest of how often faster `fast` is at that depth, by rounds."""
    pairs = zip(slow.seconds(work, layers), fast.seconds(work, layers), strict=True)
    ratios = sorted(a / b for a, b in pairs)
    return median(ratios), ratios[0], ratios[-1]


def _model(work: Work, kind: PrecisionKind, tp: int, world: World) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Return a model in this precision, and its forward and backward pass."""
    config = policy_config(work, kind, tp)
    chunks = build_chunks(work.architecture, config, world)
    _fill(chunks[0], work.architecture)
    sequences = make_sequences(work.architecture.vocabulary, work.sequences, work.sequence_length, spread=0.0)
    shape = shape_of(config, world.device.type == "cuda")
    plan = plan_micro_batches([len(s) for s in sequences], ranks=1, budget=work.tokens, shape=shape)
    batches = list(MicroBatches(sequences, plan, shape, world))

    def step() -> None:
        forward_backward(chunks, batches, config, work.architecture.vocabulary, 1.0, weighted_loss, work.tokens)

    return chunks[0], step


@torch.no_grad()
def _fill(chunk: torch.nn.Module, architecture: Architecture) -> None:
    """Matrices at random, norms 1: speed does not depend on more."""
    torch.manual_seed(0)
    for parameter in chunk.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn_like(parameter, dtype=torch.float32) * architecture.initializer_range)
        else:
            parameter.fill_(1.0)


def _timed(chunk: torch.nn.Module, step: Callable[[], None], layers: int | None = None) -> float:
    """Return seconds of a step through the first `layers` layers; the gradients are dropped afterwards."""
    whole = chunk.decoder.layers
    chunk.decoder.layers = whole[:layers]
    try:
        _wait()
        started = time.perf_counter()
        step()
        _wait()
        return time.perf_counter() - started
    finally:
        chunk.decoder.layers = whole
        _drop_gradients(chunk)


def _drop_gradients(chunk: torch.nn.Module) -> None:
    for parameter in chunk.parameters():
        parameter.grad = None


def _wait() -> None:
    """Until all ranks' devices have finished what they were asked for."""
    if uses_cuda():
        torch.cuda.synchronize()
    if dist.get_world_size() > 1:
        dist.barrier()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if uses_cuda() else 0


def _weights(chunk: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in chunk.parameters())
