"""Our training step against a plain PyTorch step of the same `transformers` model, on CPU with one thread.

Both take turns in one process, on the same sequences, in fp32, with the same loss and AdamW: forward, backward,
gradient clipping, update. First with sequences of one length, then with a long tail of lengths, which the plain step
pads and ours packs.

    python tools/bench_step.py --model DIR [--profile] [--json F]
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from benchmarks.step_comparison import (
    Comparison,
    compare_steps,
    make_sequences,
    make_steps,
    profile_table,
    vocabulary,
)

from exprl_megatron.policy.world import leave_world

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"one length": 0.0, "long tail": 0.9}


def report(model: Path, shape: str, count: int, found: Comparison) -> dict:
    """Return one comparison, printed; what goes into the JSON file."""
    print(f"\n{model.name}, {count} sequences, {found.tokens} tokens a step, {shape}")
    for name, wall, cpu in (
        ("ours", found.ours_s, found.ours_cpu_s),
        ("plain", found.plain_s, found.plain_cpu_s),
    ):
        rate = found.tokens / median(wall)
        print(f"  {name:6} {median(wall):8.3f} s a step (median) {median(cpu):8.3f} s of processor {rate:8.0f} tok/s")
    print(f"  ours / plain, tokens per second: {found.ratio:.2f} by the clock, {found.cpu_ratio:.2f} by the processor")
    (loss, plain_loss), (norm, plain_norm) = found.first_losses, found.first_norms
    print(f"  first step: loss {loss:.6f} and {plain_loss:.6f}, gradient norm {norm:.6f} and {plain_norm:.6f}")
    ratios = {"ratio": found.ratio, "cpu_ratio": found.cpu_ratio}
    return {"model": str(model), "shape": shape, "sequences": count, **ratios, **asdict(found)}


def run(args: argparse.Namespace) -> list[dict]:
    """Return all comparisons, and the profiles where they are asked for."""
    results = []
    for model in args.model:
        for shape, spread in SHAPES.items():
            sequences = make_sequences(vocabulary(model), args.sequences, args.longest, spread)
            found = compare_steps(model, sequences, args.micro_batch_tokens, args.rounds)
            results.append(report(model, shape, args.sequences, found))
            if args.profile:
                ours, plain = make_steps(model, sequences, args.micro_batch_tokens)
                print(f"\nours:\n{profile_table(ours)}\nplain:\n{profile_table(plain)}")
                leave_world()
    return results


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", default=[ROOT / "recipes" / "miniature" / "policy"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest sequence")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
