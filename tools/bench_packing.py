"""Our training step with sequences packed into rows against the same step with padded rows.

Both take turns in one process, on the same sequences and in micro-batches of the same token budget: forward, backward,
update, with one thread. Lengths have a long tail (log-normal, cut at the longest), as sampled traces have. Beside the
ratio of tokens per second stand the shares of tokens that are padding, and both first losses and gradient norms.

    python tools/bench_packing.py --model DIR [--json F]
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median

import torch

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.algorithms.objective import supervised_objective
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figures:
    """One way of laying sequences out."""

    packing: bool
    padding: float
    """Share of the model's tokens."""
    wall_s: tuple[float, ...]
    """Of each measured step."""
    cpu_s: tuple[float, ...]
    """Processor seconds of the same steps: other programs of a busy machine do not count."""
    loss: float
    grad_norm: float


class Learner:
    """A policy that repeats the same step, and its clock."""

    def __init__(self, args: argparse.Namespace, packing: bool, sequences: list[TrainSample]):
        budget = {"max_tokens": args.longest, "micro_batch_tokens": args.micro_batch_tokens}
        self.policy = Policy(PolicyConfig(model=str(args.model), packing=packing, **budget), seed=0)
        self.policy.begin_stage(OptimizerConfig(lr=1e-5), total_steps=1_000_000)
        self.sequences = sequences
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.first = self._step()

    def timed_step(self) -> None:
        """One more step, measured."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._step()
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)

    def figures(self) -> Figures:
        """Return what was measured."""
        metrics, norm = self.first
        packing = self.policy.config.packing
        padding = metrics["padding/packed" if packing else "padding/padded"]
        return Figures(packing, padding, tuple(self.wall_s), tuple(self.cpu_s), metrics["loss"], norm)

    def _step(self) -> tuple[dict[str, float], float]:
        tokens = sum(len(sequence.response_ids) for sequence in self.sequences)
        metrics = self.policy.accumulate(self.sequences, supervised_objective(), 1.0, denominator=tokens)
        return metrics | {"loss": metrics["loss"] / tokens}, self.policy.apply_update().grad_norm


def long_tailed(args: argparse.Namespace) -> list[TrainSample]:
    """Return random tokens after prompts of 8 tokens; half of the sequences are shorter than `median` tokens."""
    rng, vocabulary = Random(0), read_architecture(args.model).vocabulary
    sequences = []
    for _ in range(args.sequences):
        length = int(args.median * math.exp(rng.gauss(0.0, args.spread)))
        ids = tuple(rng.randrange(8, vocabulary) for _ in range(min(max(length, 12), args.longest)))
        sequences.append(TrainSample(ids[:8], ids[8:]))
    return sequences


def compare(args: argparse.Namespace, sequences: list[TrainSample]) -> tuple[Figures, Figures]:
    """Packed and padded, turn by turn, after a step of each to warm up."""
    enter_world(Layout())
    learners = [Learner(args, packing, sequences) for packing in (True, False)]
    for turn in range(args.rounds):
        for learner in learners if turn % 2 else reversed(learners):
            learner.timed_step()
    leave_world()
    packed, padded = (learner.figures() for learner in learners)
    return packed, padded


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "recipes" / "miniature" / "policy")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--median", type=int, default=48, help="median length in tokens")
    parser.add_argument("--spread", type=float, default=0.9, help="standard deviation of the lengths' logarithm")
    parser.add_argument("--longest", type=int, default=256, help="longer sequences are cut to this")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sequences = long_tailed(args)
    packed, padded = compare(args, sequences)
    tokens = sum(map(len, sequences))
    print(f"{args.model.name}: {len(sequences)} sequences, {tokens} tokens, the longest {max(map(len, sequences))}")
    for name, figures in (("packed", packed), ("padded", padded)):
        wall, cpu = median(figures.wall_s), median(figures.cpu_s)
        print(f"  {name}  padding {figures.padding:5.1%}  {tokens / wall:7.0f} tok/s  {cpu:7.3f} s of processor a step")
        print(f"          first step: loss {figures.loss:.6f}, gradient norm {figures.grad_norm:.6f}")
    ratios = {
        "ratio": median(b / a for a, b in zip(packed.wall_s, padded.wall_s, strict=True)),
        "cpu_ratio": median(b / a for a, b in zip(packed.cpu_s, padded.cpu_s, strict=True)),
    }
    print(f"  packed / padded, tokens per second: {ratios['ratio']:.2f}, by the processor {ratios['cpu_ratio']:.2f}")
    if args.json is not None:
        found = {"tokens": tokens, **ratios, "packed": asdict(packed), "padded": asdict(padded)}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
