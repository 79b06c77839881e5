"""FP8 against BF16 on a few real layers of a published model: forward and backward on the GPUs at hand.

Precisions take turns round by round; the first figures are of the layers that were built, the second of the full
depth, from the time that a layer adds. More than one GPU (tensor parallelism):

    torchrun --nproc-per-node 8 tools/bench_fp8.py --tp 8

On a machine without CUDA the same code runs on narrower layers in bf16 and fp32, no FP8 kernel runs, and what an H100
would do is the planner's prediction.

    python tools/bench_fp8.py [--model llama3-70b] [--layers 4] [--precision bf16,fp8-tensorwise,fp8-blockwise]
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch
from benchmarks.layer_report import known_gpu, measured_lines, predicted, predicted_lines, throughput
from benchmarks.layers import Work, measure_layers, narrowed, policy_config

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionKind
from exprl_megatron.errors import UserError
from exprl_megatron.models.precision_matrix import Setting, precision_violations
from exprl_megatron.planning.hardware import find_gpu
from exprl_megatron.planning.targets import find_architecture
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.utils.accelerator import uses_cuda

NAMES = {"llama3-70b": "llama-3.1-70b", "llama3-8b": "llama-3.1-8b"}
CPU_KINDS = ["bf16", "fp32"]
CPU_SHRINK, CPU_LENGTH = 16, 256
NO_GPU = "No GPU here: no FP8 kernel ran, nothing here tells how fast one is, and without a named peak there is no MFU."


def run(args: argparse.Namespace) -> dict:
    """Measure, print on rank 0, and return all figures."""
    published, _ = find_architecture(NAMES.get(args.model, args.model))
    kinds, cuda = args.precision.split(","), uses_cuda()
    if unknown := set(kinds) - set(get_args(PrecisionKind)):
        raise UserError(
            f"--precision has {', '.join(sorted(unknown))}; choose from {', '.join(get_args(PrecisionKind))}."
        )
    if not 1 <= args.layers // 2 < args.layers:
        raise UserError(f"--layers is {args.layers}; give 2 or more, as a layer's time comes from two depths.")
    shrink = args.shrink or (1 if cuda else CPU_SHRINK)
    built = replace(narrowed(published, shrink, args.tp) if shrink > 1 else published, layers=args.layers)
    length = args.seq if cuda else min(args.seq, CPU_LENGTH)
    work = Work(built, args.layers // 2, length, args.sequences)
    asked = replace(work, sequence_length=args.seq)
    world = enter_world(Layout(tp=args.tp))
    if cuda:
        check_precisions(work, kinds, args.tp)
    gpu = known_gpu(torch.cuda.get_device_name()) if cuda else None
    planned_for = gpu or find_gpu(args.gpu)
    predictions = predicted_lines(published, kinds, asked, args.tp, planned_for)
    found = measure_layers(work, kinds if cuda else CPU_KINDS, args.tp, args.rounds, world)
    device = torch.cuda.get_device_name() if cuda else "CPU"
    lines = [
        f"{args.model} on {device}, tp {args.tp}, {work.sequences} x {length} tokens, width 1/{shrink}: "
        f"hidden {built.hidden}, ffn {built.ffn}, {built.heads} heads, {built.kv_groups} KV heads, "
        f"vocabulary {built.vocabulary}",
        *([] if cuda else [NO_GPU]),
        *measured_lines(found, work, published.layers, args.tp, gpu),
        *predictions,
    ]
    if world.rank == 0:
        print("\n".join(lines))
    leave_world()
    depths = (args.layers, published.layers)
    return {
        "device": device,
        "tp": args.tp,
        "shrink": shrink,
        "fp8_kernels": cuda,
        "rounds": [asdict(figures) for figures in found],
        "measured": [
            asdict(throughput(f, work, layers, args.tp, gpu))
            for f in found
            for layers in (depths if f.extrapolates(work) else depths[:1])
        ],
        "predicted": [
            {"gpu": planned_for.name}
            | asdict(predicted(replace(published, layers=layers), kind, asked, args.tp, planned_for))
            for kind in kinds
            for layers in depths
        ],
    }


def check_precisions(work: Work, kinds: list[PrecisionKind], tp: int) -> None:
    """Raises UserError where this machine's GPU cannot multiply so."""
    capability = torch.cuda.get_device_capability()
    settings = [Setting(policy_config(work, kind, tp), capability, architecture=work.architecture) for kind in kinds]
    if refused := [sentence for setting in settings for sentence in precision_violations(setting)]:
        raise UserError(" ".join(refused))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-70b", help="a published model's name, or a directory")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1, help="GPUs, as many as torchrun starts processes")
    parser.add_argument("--precision", default="bf16,fp8-tensorwise,fp8-blockwise")
    parser.add_argument("--seq", type=int, default=8192, help="tokens of a sequence (on a CPU at most 256)")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--shrink", type=int, help="divide every width by this (on a CPU: 16)")
    parser.add_argument("--gpu", default="h100", help="the GPU to predict for where there is none")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(arguments)
    try:
        figures = run(args)
    except UserError as error:
        sys.exit(f"bench_fp8: {error}")
    if args.json is not None and os.environ.get("RANK", "0") == "0":
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
