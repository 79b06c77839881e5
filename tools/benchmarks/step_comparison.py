"""Compares our training step with a plain one: the same model and sequences, in turns in one process."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import torch

from benchmarks.plain_step import PlainStep, weighted_loss
from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world

OPTIMIZER = OptimizerConfig(lr=1e-5)
Step = Callable[[], tuple[float, float]]
"""Takes one optimizer step; its loss and its gradient norm."""


@dataclass(frozen=True)
class Comparison:
    """Seconds of every measured step, and what the first step of either found."""

    tokens: int
    """Tokens of a step, padding not counted."""
    ours_s: tuple[float, ...]
    plain_s: tuple[float, ...]
    ours_cpu_s: tuple[float, ...]
    """Processor seconds of the same steps: other programs of a busy machine do not count."""
    plain_cpu_s: tuple[float, ...]
    first_losses: tuple[float, float]
    """Ours, plain."""
    first_norms: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Our tokens per second over the plain step's: the median over pairs of neighboring steps."""
        return median(plain / ours for ours, plain in zip(self.ours_s, self.plain_s, strict=True))

    @property
    def cpu_ratio(self) -> float:
        """The same in processor seconds."""
        return median(plain / ours for ours, plain in zip(self.ours_cpu_s, self.plain_cpu_s, strict=True))


def make_sequences(vocabulary: int, count: int, longest: int, spread: float, seed: int = 0) -> list[TrainSample]:
    """Return random tokens, a quarter of each sequence prompt, with random advantages.

    Lengths fall from `longest` to (1 - spread) x `longest`; spread 0 makes all alike.
    """
    rng = Random(seed)
    sequences = []
    for i in range(count):
        length = max(4, round(longest * (1 - spread * i / max(1, count - 1))))
        # The first few are often padding, whose embedding gets no gradient in transformers.
        ids = tuple(rng.randrange(8, vocabulary) for _ in range(length))
        cut = length // 4
        advantages = tuple(rng.uniform(-1, 1) for _ in range(length - cut))
        sequences.append(TrainSample(ids[:cut], ids[cut:], advantages))
    return sequences


def compare_steps(directory: str | Path, sequences: Sequence[TrainSample], budget: int, rounds: int) -> Comparison:
    """`rounds` steps of either, turn by turn, after one of each to warm up; `budget`: tokens in a micro-batch."""
    ours, plain = make_steps(directory, sequences, budget)
    first, first_plain = ours(), plain()
    seconds: list[list[float]] = [[], [], [], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            wall, cpu = _timed((ours, plain)[which])
            seconds[which].append(wall)
            seconds[which + 2].append(cpu)
    leave_world()
    tokens = sum(map(len, sequences))
    return Comparison(tokens, *map(tuple, seconds), *zip(first, first_plain, strict=True))


def make_steps(directory: str | Path, sequences: Sequence[TrainSample], budget: int) -> tuple[Step, Step]:
    """Our step and the plain one on `sequences`; this process enters a world of one rank."""
    enter_world(Layout())
    longest = max(map(len, sequences))
    config = PolicyConfig(model=str(directory), max_tokens=longest, micro_batch_tokens=budget)
    policy = Policy(config, seed=0)
    policy.begin_stage(OPTIMIZER, total_steps=1_000_000)
    plain = PlainStep(directory, OPTIMIZER, budget)
    weighted = float(sum(len(sequence.response_ids) for sequence in sequences))

    def ours() -> tuple[float, float]:
        metrics = policy.accumulate(sequences, weighted_loss, temperature=1.0, denominator=weighted)
        return metrics["loss"] / weighted, policy.apply_update().grad_norm

    return ours, lambda: plain.step(sequences, weighted)


def profile_table(step: Step, rows: int = 15) -> str:
    """Where a step's processor time goes, by operation."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=48)


def vocabulary(directory: str | Path) -> int:
    """Return the number of tokens of the model in `directory`."""
    return read_architecture(directory).vocabulary


def _timed(step: Step) -> tuple[float, float]:
    """Return wall and processor seconds of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu
