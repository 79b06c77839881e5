"""The layouts of a number of GPUs that can hold a model, pruned by memory and ranked by training time."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, layout_violations
from exprl_megatron.models.precision_matrix import BLACKWELL, HOPPER, Setting, precision_violations
from exprl_megatron.planning.hardware import GIB, Gpu
from exprl_megatron.planning.memory import USABLE, Memory, training_memory
from exprl_megatron.planning.parameters import model_parameters
from exprl_megatron.planning.rl_time import VARIABLE_LENGTH_SLOWDOWN
from exprl_megatron.planning.trainer_features import TrainerFeatures
from exprl_megatron.planning.training_time import TrainingTime, log_prob_time, micro_batches, training_time
from exprl_megatron.planning.workload import Workload

TIE_RATIO = 1.005
"""Seconds that differ by less count as equal."""
MIN_CP_CHUNK_TOKENS = 2048
"""Context parallelism that leaves a rank fewer tokens of the longest sequence is not looked at."""


@dataclass(frozen=True)
class TrainerPlan:
    """A trainer in one layout: its memory and its seconds for one step."""

    policy: PolicyConfig
    stages: tuple[Memory, ...]
    """Peak of training on the ranks of each pipeline stage."""
    training: TrainingTime
    """One optimizer step over full sequences."""
    log_probs: TrainingTime | None
    """One forward pass over the whole step's tokens, as full sequences; None where none is needed."""
    passes: int
    """Forward passes: under the reference policy, and under the old one where a step has several updates."""
    updates: int
    slowdown: float
    """By which both are slower on traces of many lengths, with the losses of reinforcement learning."""

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.policy.layout

    @property
    def memory(self) -> Memory:
        """Peak of training on the fullest rank."""
        return max(self.stages, key=lambda memory: memory.total)

    @property
    def training_s(self) -> float:
        """Seconds of all updates of a step."""
        return self.slowdown * self.updates * self.training.total_s

    @property
    def log_probs_s(self) -> float:
        """Seconds of all forward passes of a step."""
        return self.slowdown * self.passes * self.log_probs.total_s if self.log_probs else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all computation of the trainer in a step."""
        return self.training_s + self.log_probs_s

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """The step's tokens over the seconds of its updates."""
        return self.training.tokens_per_s_per_gpu / self.slowdown

    @property
    def mfu(self) -> float:
        """Share of the training's peak that the model's own operations take in the updates."""
        return self.training.mfu / self.slowdown


@dataclass(frozen=True)
class Ranking:
    """Layouts that fit into memory, the fastest first, and how many were looked at."""

    layouts: list[TrainerPlan]
    candidates: int
    """Legal layouts."""
    fit_without_recompute: int
    """Of these, that fit without recomputation."""
    fit_with_recompute: int
    """Of these, that fit with full recomputation alone."""


def plan_trainer(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, workload: Workload, gpu: Gpu
) -> TrainerPlan:
    """Return the memory and seconds of one layout. Raises UserError for a precision that the GPU does not run."""
    layout = policy.layout
    tokens = ceil(workload.tokens / workload.updates)
    shared: dict[str, Any] = {
        "precision": policy.precision,
        "sequence_length": round(workload.sequence_length),
        "micro_batch_tokens": policy.micro_batch_tokens,
        "gpu": gpu,
        "features": TrainerFeatures(dp_overlap=optimizer.overlap, offload=optimizer.offload),
    }
    here = workload.keeps_ref_policy and policy.ref_policy == "host"
    passes = int(here) + int(workload.updates > 1)
    return TrainerPlan(
        policy=policy,
        stages=tuple(stage_memory(architecture, policy, optimizer, workload, gpu)),
        training=training_time(architecture, layout, recompute=policy.recompute, global_tokens=tokens, **shared),
        log_probs=log_prob_time(architecture, layout, global_tokens=workload.tokens, **shared) if passes else None,
        passes=passes,
        updates=workload.updates,
        slowdown=VARIABLE_LENGTH_SLOWDOWN if workload.sampled else 1.0,
    )


def stage_memory(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, workload: Workload, gpu: Gpu
) -> Iterator[Memory]:
    """Yield the peak of training on the ranks of each pipeline stage, one after the other."""
    layout = policy.layout
    batches = micro_batches(layout, workload.tokens / workload.updates, policy.micro_batch_tokens)
    for rank in range(layout.pp):
        yield training_memory(architecture, policy, optimizer, rank, batches, gpu)


def rank_layouts(
    architecture: Architecture,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    workload: Workload,
    gpu: Gpu,
    gpus: int,
) -> Ranking:
    """Rank the layouts that fit into memory, the fastest first; of those that differ in virtual stages only the best.

    Recomputation is taken where a layout does not fit without.

    Raises:
        UserError: none fits; the error has the reason.
    """
    fitting: dict[str, list[TrainerPlan]] = {"none": [], "full": []}
    legal = list(legal_layouts(architecture, policy, optimizer, gpu, gpus))
    for layout in legal:
        for recompute, found in fitting.items():
            tried = policy.model_copy(update={"layout": layout, "recompute": recompute})
            memory = stage_memory(architecture, tried, optimizer, workload, gpu)
            if all(one.excess_bytes(gpu) <= 0 for one in memory):
                found.append(plan_trainer(architecture, tried, optimizer, workload, gpu))
                break
    pipelines: dict[Layout, list[TrainerPlan]] = {}
    for one in fitting["none"] + fitting["full"]:
        pipelines.setdefault(one.layout.model_copy(update={"vpp": 1}), []).append(one)
    best = sorted(map(_most_memory_left, pipelines.values()), key=lambda one: (one.seconds, one.memory.total))
    if not best:
        raise UserError(_nothing_fits(architecture, policy, optimizer, gpu, gpus, legal))
    return Ranking(best, len(legal), len(fitting["none"]), len(fitting["full"]))


def _most_memory_left(pipelines: list[TrainerPlan]) -> TrainerPlan:
    """Return the plan with the most memory left of those within `TIE_RATIO` of the fastest."""
    fastest = min(one.seconds for one in pipelines)
    return min(
        (one for one in pipelines if one.seconds <= fastest * TIE_RATIO),
        key=lambda one: (one.memory.total, one.seconds),
    )


def _nothing_fits(architecture, policy, optimizer, gpu: Gpu, gpus: int, legal: list[Layout]) -> str:
    if not legal:
        violations = precision_violations(_setting(architecture, policy, optimizer, gpu))
        if violations:
            return "\n".join(violations)
        return f"No layout of {gpus} GPUs cuts {policy.model} evenly; take another number of GPUs."
    each = 6 + 12 * (1 - optimizer.offload) if policy.precision.dtype == "bf16" else 8 + 8 * (1 - optimizer.offload)
    state, room = model_parameters(architecture) * each / GIB, gpus * gpu.memory_bytes * USABLE / GIB
    return (
        f"{gpus} {gpu.name} cannot hold the trainer of {policy.model} in any of {len(legal)} layouts: weights, "
        f"gradients and optimizer take {state:,.0f} GiB at least, and {room:,.0f} GiB may be filled; take more GPUs, a "
        "larger one, or optimizer.offload."
    )


def legal_layouts(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, gpu: Gpu, gpus: int
) -> Iterator[Layout]:
    """Yield the layouts of `gpus` GPUs that Megatron can build: tensor parallelism within a node and with sequence
    parallelism, whole nodes' worth of everything else."""
    for layout in _candidates(architecture, policy.max_tokens, gpu, gpus):
        setting = _setting(architecture, policy.model_copy(update={"layout": layout}), optimizer, gpu)
        if not (layout.violations(None) or layout_violations(architecture, layout) or precision_violations(setting)):
            yield layout


def _setting(architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, gpu: Gpu) -> Setting:
    return Setting(
        policy=policy,
        capability=BLACKWELL if gpu.blackwell else HOPPER,
        optimizers=(optimizer,),
        architecture=architecture,
    )


def _candidates(architecture: Architecture, longest: int, gpu: Gpu, gpus: int) -> Iterator[Layout]:
    experts = architecture.experts.count if architecture.experts else 1
    for tp in _powers(min(gpu.gpus_per_node, 8, gpus)):
        for cp in _powers(max(1, longest // MIN_CP_CHUNK_TOKENS)):
            for pp in _divisors(gpus // (tp * cp) if gpus % (tp * cp) == 0 else 0, architecture.layers):
                dp = gpus // (tp * cp * pp)
                for ep in _powers(min(experts, tp * cp * dp)):
                    for ends, vpp in _pipelines(architecture.layers, pp):
                        yield Layout(
                            tp=tp,
                            pp=pp,
                            vpp=vpp,
                            cp=cp,
                            ep=ep,
                            dp=dp,
                            sequence_parallel=tp > 1,
                            embedding_as_layer=ends,
                            head_as_layer=ends,
                        )


def _pipelines(layers: int, pp: int) -> Iterator[tuple[bool, int]]:
    """Yield (whether the embedding and the output layer count as layers, virtual stages)."""
    for ends in (False, True) if pp > 1 else (False,):
        slots = layers + 2 * ends
        if slots % pp == 0:
            most = slots // pp if pp > 1 else 1
            yield from ((ends, vpp) for vpp in _divisors(most, 10))


def _powers(most: int) -> list[int]:
    return [2**k for k in range(max(1, most).bit_length()) if 2**k <= most]


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
