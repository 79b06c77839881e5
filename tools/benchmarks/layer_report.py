"""What the benchmark of layers says: throughput and utilisation here and at the full depth, and predictions."""

from dataclasses import dataclass, replace
from statistics import median

from benchmarks.layers import LayerFigures, Work, per_layer, speedups
from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig, PrecisionKind
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.flops import model_flops
from exprl_megatron.planning.hardware import GPUS, Gpu
from exprl_megatron.planning.training_time import training_time

NVIDIA_SPEEDUP = 1.40
"""FP8 over BF16, Llama 3.1 70B on 64 H100, whole training steps (NVIDIA, dgxc-benchmarking, release 25.03)."""


@dataclass(frozen=True)
class Throughput:
    """Of forward and backward, without optimizer, bubble or data-parallel transfers."""

    precision: PrecisionKind
    layers: int
    seconds: float
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    """Operations that the model needs, attention counted causally, nothing recomputed."""
    mfu: float | None
    peak: str | None
    """What `mfu` refers to; None where the device's peak is not known."""


def known_gpu(device_name: str) -> Gpu | None:
    """Return the planner's entry for what torch.cuda.get_device_name says, the longest name that fits."""
    fitting = [name for name in GPUS if name in device_name.lower()]
    return GPUS[max(fitting, key=len)] if fitting else None


def throughput(figures: LayerFigures, work: Work, layers: int, tp: int, gpu: Gpu | None) -> Throughput:
    """Return the medians of `figures`, at the depth of `layers`."""
    seconds = median(figures.seconds(work, layers))
    architecture = replace(work.architecture, layers=layers)
    return _throughput(figures.precision, architecture, work, seconds, tp, gpu)


def predicted(architecture: Architecture, kind: PrecisionKind, work: Work, tp: int, gpu: Gpu) -> Throughput:
    """Return what the planner expects of one micro-batch of the whole `architecture` on `gpu`."""
    found = training_time(
        architecture,
        Layout(tp=tp, sequence_parallel=tp > 1),
        precision=PrecisionConfig(kind=kind),
        recompute="none",
        sequence_length=work.sequence_length,
        global_tokens=work.tokens,
        micro_batch_tokens=work.tokens,
        gpu=gpu,
    )
    seconds = found.total_s - found.optimizer_s - found.dp_comm_s
    return _throughput(kind, architecture, work, seconds, tp, gpu)


def _throughput(kind: PrecisionKind, architecture: Architecture, work: Work, seconds: float, tp: int, gpu: Gpu | None):
    rate = work.tokens / seconds / tp
    flops = model_flops(architecture, work.sequence_length) * rate
    name, peak = gpu.peak(kind) if gpu is not None else (None, None)
    return Throughput(kind, architecture.layers, seconds, rate, flops / 1e12, flops / peak if peak else None, name)


def line(found: Throughput, peak_bytes: int | None = None) -> str:
    """Return one row of the report."""
    text = f"  {found.precision:15} {found.seconds:10.4f} s {found.tokens_per_s_per_gpu:10,.0f} tok/s/GPU "
    text += f"{found.tflops_per_gpu:8.2f} TFLOP/s"
    if found.mfu is not None:
        text += f"  MFU {found.mfu:6.1%} of {found.peak}"
    return text + (f"  peak {peak_bytes / 2**30:.2f} GiB" if peak_bytes is not None else "")


def measured_lines(all_figures: list[LayerFigures], work: Work, full: int, tp: int, gpu: Gpu | None) -> list[str]:
    """Return the measured part of the report, `full` being the published model's depth."""
    lines = [f"measured, {work.architecture.layers} layers with embedding and output layer, forward and backward:"]
    for figures in all_figures:
        lines.append(line(throughput(figures, work, work.architecture.layers, tp, gpu), figures.peak_bytes))
    lines.append(f"extrapolated to {full} layers (seconds of a layer from {work.shallow} and of all layers):")
    for figures in all_figures:
        if not figures.extrapolates(work):
            lines.append(
                f"  {figures.precision:15} not extrapolated: in a round {work.shallow} layers took as long as "
                f"{work.architecture.layers}; measure on a quieter machine, or with more --layers"
            )
            continue
        one = median(per_layer(d, s, work) for d, s in zip(figures.deep_s, figures.shallow_s, strict=True))
        rest = median(figures.seconds(work, 0))
        lines.append(f"{line(throughput(figures, work, full, tp, gpu))}  a layer {one:.4g} s, the rest {rest:.4g} s")
    return lines + speedup_lines(all_figures, work, full)


def speedup_lines(all_figures: list[LayerFigures], work: Work, full: int) -> list[str]:
    """FP8 over BF16 of this run; nothing where one of the two was not measured."""
    slow = next((figures for figures in all_figures if figures.precision == "bf16"), None)
    lines = []
    for figures in all_figures:
        if slow is not None and PrecisionConfig(kind=figures.precision).fp8:
            here = speedups(slow, figures, work, work.architecture.layers)
            text = f"{figures.precision} over bf16: {here[0]:.2f}x measured ({here[1]:.2f} to {here[2]:.2f} by rounds)"
            if slow.extrapolates(work) and figures.extrapolates(work):
                text += f", {speedups(slow, figures, work, full)[0]:.2f}x at {full} layers"
            lines.append(f"{text}; NVIDIA's {NVIDIA_SPEEDUP:.2f}x is of whole training steps")
    return lines


def predicted_lines(architecture: Architecture, kinds: list[PrecisionKind], work: Work, tp: int, gpu: Gpu) -> list[str]:
    """Return the planner's figures for the published widths, at this depth and at the full one, each line marked."""
    lines = []
    for layers in (work.architecture.layers, architecture.layers):
        model = replace(architecture, layers=layers)
        lines.append(f"PREDICTION by the planner, not measured: {gpu.name}, tp {tp}, {layers} layers at full width:")
        found = [predicted(model, kind, work, tp, gpu) for kind in kinds]
        lines += ["PREDICTION" + line(one) for one in found]
        slow = next((one for one in found if one.precision == "bf16"), None)
        for one in found:
            if slow is not None and PrecisionConfig(kind=one.precision).fp8:
                ratio = slow.seconds / one.seconds
                lines.append(f"PREDICTION  {one.precision} over bf16: {ratio:.2f}x (NVIDIA: {NVIDIA_SPEEDUP:.2f}x)")
    return lines
