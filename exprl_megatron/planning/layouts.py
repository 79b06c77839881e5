"""Every layout of so many GPUs that can hold a model, pruned by memory, ranked by the seconds of learning."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.memory import Memory, training_memory
from exprl_megatron.planning.practice import Practice
from exprl_megatron.planning.training_time import TrainingTime, log_prob_time, training_time
from exprl_megatron.planning.workload import Workload
from exprl_megatron.policy.architecture import Architecture, layout_violations
from exprl_megatron.policy.precision_matrix import BLACKWELL, HOPPER, Setting, precision_violations

SHORTEST_PIECE = 2048
"""Context parallelism that leaves a rank fewer tokens of the longest sequence is not looked at."""


@dataclass(frozen=True)
class Learning:
    """A trainer in one layout: its fullest rank and its seconds for one step."""

    policy: PolicyConfig
    memory: Memory
    """Peak of training on the fullest rank."""
    pp_rank: int
    """The fullest rank's pipeline stage."""
    training: TrainingTime
    """One optimizer step."""
    log_probs: TrainingTime | None
    """One forward pass over the whole step's tokens; None where none is needed."""
    passes: int
    """Forward passes: under the starting policy, and under the old one where a step has several updates."""
    updates: int

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.policy.layout

    @property
    def seconds(self) -> float:
        """Of all that the trainer computes in a step."""
        forward = self.log_probs.total_s * self.passes if self.log_probs else 0.0
        return self.training.total_s * self.updates + forward


def learning(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, workload: Workload, gpu: Gpu
) -> Learning:
    """Memory and seconds of one layout. Raises UserError for a precision that the GPU does not run."""
    layout = policy.layout
    memory, pp_rank = fullest_rank(architecture, policy, optimizer, workload, gpu)
    tokens = ceil(workload.tokens / workload.updates)
    shared = {
        "precision": policy.precision,
        "sequence_length": round(workload.sequence_length),
        "micro_batch_tokens": policy.micro_batch_tokens,
        "gpu": gpu,
        "practice": Practice(dp_overlap=optimizer.overlap, offload=optimizer.offload),
    }
    here = workload.keeps_start and policy.starting_policy == "host"
    passes = int(here) + int(workload.updates > 1)
    return Learning(
        policy=policy,
        memory=memory,
        pp_rank=pp_rank,
        training=training_time(architecture, layout, recompute=policy.recompute, global_tokens=tokens, **shared),
        log_probs=log_prob_time(architecture, layout, global_tokens=workload.tokens, **shared) if passes else None,
        passes=passes,
        updates=workload.updates,
    )


def fullest_rank(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, workload: Workload, gpu: Gpu
) -> tuple[Memory, int]:
    """The peak of training on the rank that has most, and that rank's pipeline stage."""
    layout = policy.layout
    tokens = ceil(workload.tokens / workload.updates)
    micro_batches = max(1, ceil(tokens / (policy.micro_batch_tokens * layout.dp)))
    ranks = (
        (training_memory(architecture, policy, optimizer, rank, micro_batches, gpu), rank) for rank in range(layout.pp)
    )
    return max(ranks, key=lambda found: found[0].total)


def rank_layouts(
    architecture: Architecture,
    policy: PolicyConfig,
    optimizer: OptimizerConfig,
    workload: Workload,
    gpu: Gpu,
    gpus: int,
) -> list[Learning]:
    """Those that fit into memory, the fastest first, of several pipelines that differ in virtual stages the best.

    Recomputation is taken where a layout does not fit without.
    """
    found = []
    for layout in legal_layouts(architecture, policy, optimizer, gpu, gpus):
        for recompute in ("none", "full"):
            tried = policy.model_copy(update={"layout": layout, "recompute": recompute})
            if fullest_rank(architecture, tried, optimizer, workload, gpu)[0].over(gpu) <= 0:
                found.append(learning(architecture, tried, optimizer, workload, gpu))
                break
    best: dict[Layout, Learning] = {}
    for one in sorted(found, key=lambda one: (one.seconds, one.memory.total)):
        best.setdefault(one.layout.model_copy(update={"vpp": 1}), one)
    return list(best.values())


def legal_layouts(
    architecture: Architecture, policy: PolicyConfig, optimizer: OptimizerConfig, gpu: Gpu, gpus: int
) -> Iterator[Layout]:
    """Layouts of `gpus` GPUs that Megatron can build: tensor parallelism within a node and with sequence parallelism,
    whole nodes' worth of everything else."""
    for layout in _candidates(architecture, policy.max_tokens, gpu, gpus):
        setting = Setting(
            policy=policy.model_copy(update={"layout": layout}),
            capability=BLACKWELL if gpu.blackwell else HOPPER,
            optimizers=(optimizer,),
            architecture=architecture,
        )
        if not (layout.violations(None) or layout_violations(architecture, layout) or precision_violations(setting)):
            yield layout


def _candidates(architecture: Architecture, longest: int, gpu: Gpu, gpus: int) -> Iterator[Layout]:
    experts = architecture.experts.count if architecture.experts else 1
    for tp in _powers(min(gpu.gpus_per_node, 8, gpus)):
        for cp in _powers(max(1, longest // SHORTEST_PIECE)):
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
    """(whether the embedding and the output layer count as layers, virtual stages)."""
    for ends in (False, True) if pp > 1 else (False,):
        slots = layers + 2 * ends
        if slots % pp == 0:
            most = slots // pp if pp > 1 else 1
            yield from ((ends, vpp) for vpp in _divisors(most, 10))


def _powers(most: int) -> list[int]:
    return [2**k for k in range(max(1, most).bit_length()) if 2**k <= most]


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
