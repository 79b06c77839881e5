"""Forward and backward passes over micro-batches, with Megatron's pipeline schedule of the layout."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from exprl_megatron.algorithms.batch import LossFunction, MicroBatch, SampleOrOutline, TrainSample, dummy_sample, pad
from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy.gloo_group import broadcast_from_rank
from exprl_megatron.policy.log_probs import response_log_probs
from exprl_megatron.policy.model_input import ModelInput, model_input
from exprl_megatron.policy.packing import MicroBatchPlan, PackingShape
from exprl_megatron.policy.routed_rows import routed_rows
from exprl_megatron.policy.router_replay import Replay
from exprl_megatron.policy.world import World

PreparedMicroBatch = tuple[ModelInput, MicroBatch]
"""A micro-batch in the form of the model's inputs and in the form that losses read."""


class MicroBatches:
    """This rank's micro-batches of a plan; each is built when it is needed, so that a step never holds all of them.

    Where `routing` is given, with this rank's layers of experts, the routers take the experts that the samples carry.
    """

    def __init__(
        self,
        samples: Sequence[SampleOrOutline],
        plan: MicroBatchPlan,
        shape: PackingShape,
        world: World,
        routing: tuple[Routing, tuple[int, ...]] | None = None,
    ):
        self._samples = samples
        self._micros = plan[world.dp_rank]
        self._shape = shape
        self._world = world
        self._routing = routing

    def __len__(self) -> int:
        return len(self._micros)

    def __iter__(self) -> Iterator[PreparedMicroBatch]:
        for rows in self._rows():
            length = max(map(len, rows))
            model = model_input(rows, length, self._shape, self._world.cp_rank)
            if self._routing is not None:
                model = replace(model, routed_experts=routed_rows(rows, self._shape, *self._routing, self._world))
            yield model.to(self._world.device), pad(rows, length).to(self._world.device)

    @property
    def replays(self) -> bool:
        """Whether the routers take the samples' experts."""
        return self._routing is not None

    @property
    def computed_tokens(self) -> int:
        """Number of tokens that this rank's model computes, with padding."""
        sizes = (sum(self._shape.with_padding([len(sample) for sample in rows])) for rows in self._rows())
        return sum(sizes) // self._shape.cp

    def _rows(self) -> Iterator[list[TrainSample]]:
        for indices in self._micros:
            yield [self._samples[index] for index in indices] or [dummy_sample(self._samples)]


def forward_log_probs(
    model: list[torch.nn.Module],
    work: MicroBatches | list[PreparedMicroBatch],
    config: PolicyConfig,
    vocabulary: int,
    temperature: float,
) -> list[torch.Tensor]:
    """Compute the log-probs [B, T] of each micro-batch on the last pipeline stage; an empty list on the others."""

    def collect(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return output[0]

    with torch.no_grad():
        return _run(model, work, config, vocabulary, temperature, lambda micro: collect, forward_only=True)


def forward_backward(
    model: list[torch.nn.Module],
    work: MicroBatches | list[PreparedMicroBatch],
    config: PolicyConfig,
    vocabulary: int,
    temperature: float,
    loss_fn: LossFunction,
    denominator: float,
) -> list[dict[str, torch.Tensor]]:
    """Add the gradients of sum(loss) / denominator; returns the micro-batches' metrics on the last stage, else []."""

    def loss_of(micro: MicroBatch):
        def compute(output: torch.Tensor):
            loss, metrics = loss_fn(output[0], output[1], micro)
            # Megatron does not use the token count in the middle here: the policy finalizes the gradients itself.
            return loss / denominator, torch.zeros((), dtype=torch.int, device=loss.device), metrics

        return compute

    return _run(model, work, config, vocabulary, temperature, loss_of, forward_only=False)


def _run(
    model,
    work: MicroBatches | list[PreparedMicroBatch],
    config: PolicyConfig,
    vocabulary: int,
    temperature: float,
    on_output,
    forward_only,
):
    def output_processor(*, hidden_states, output_layer, output_weight, context: PreparedMicroBatch, **_):
        tokens, micro = context
        return response_log_probs(
            hidden_states,
            output_layer.weight if output_weight is None else output_weight,
            micro.targets,
            tokens.places,
            tokens.slots,
            temperature=temperature,
            vocabulary=vocabulary,
            chunk=config.log_prob_chunk,
            sequence_parallel=config.layout.sequence_parallel,
        )

    # Only `recompute: full` runs routers again.
    replays = isinstance(work, MicroBatches) and work.replays
    replay = Replay(model, not forward_only and config.recompute == "full") if replays else None

    def forward_step(iterator, chunk):
        tokens, micro = next(iterator)
        with nullcontext() if replay is None else replay.forward(chunk, tokens.routed_experts):
            output = chunk(
                tokens.input_ids,
                tokens.position_ids,
                None,
                packed_seq_params=_packed(tokens),
                output_processor=output_processor,
                output_processor_context=(tokens, micro),
            )
        return output, on_output(micro)

    try:
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(work) for _ in model],
            model=model,
            num_microbatches=len(work),
            seq_length=config.max_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    finally:
        if replay is not None:
            replay.end()


def _packed(tokens: ModelInput) -> PackedSeqParams | None:
    """Describe packed sequences; padding belongs to the sequence before it, and the causal mask hides it."""
    if tokens.cu_seqlens is None:
        return None
    begins, longest = tokens.cu_seqlens, tokens.longest
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=begins,
        cu_seqlens_kv=begins,
        cu_seqlens_q_padded=begins,
        cu_seqlens_kv_padded=begins,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,
    )


def global_metrics(collected: list[dict[str, torch.Tensor]], world: World) -> dict[str, float]:
    """Reduce metrics, 0-dim tensors by name, to sums or maxima over micro-batches and data-parallel ranks.

    Returns the same on every rank. All ranks of a context-parallel group have the metrics of their whole micro-batches,
    so
    these are not summed over the group.
    """
    totals: dict[str, float] = {}
    names = sorted(collected[0]) if world.last_stage else []
    if names:
        rows = torch.stack([torch.stack([one[name].double() for name in names]) for one in collected])
        largest = torch.tensor([name.endswith("/max") for name in names], device=rows.device)
        group = parallel_state.get_data_parallel_group()
        sums, maxima = rows.sum(dim=0), rows.amax(dim=0)
        dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        totals = dict(zip(names, torch.where(largest, maxima, sums).tolist(), strict=True))
    if world.layout.pp > 1:
        # Pipeline stages are the outermost dimension of the layout: the last rank has the model's end.
        return broadcast_from_rank(dist.get_world_size() - 1, totals)
    return totals


def share_log_probs(
    samples: Sequence[SampleOrOutline], plan: MicroBatchPlan, collected: list[torch.Tensor], world: World
) -> list[np.ndarray]:
    """Collect the log-probs [response tokens] of all samples on every rank, from all ranks' micro-batches."""
    offsets = [0, *accumulate(sample.response_tokens for sample in samples)]
    flat = torch.zeros(offsets[-1], dtype=torch.float32, device=world.device)
    if world.last_stage and world.tp_rank == world.cp_rank == 0:
        for indices, log_probs in zip(plan[world.dp_rank], collected, strict=True):
            for row, index in enumerate(indices):
                first, last = samples[index].prompt_tokens - 1, len(samples[index]) - 1
                flat[offsets[index] : offsets[index + 1]] = log_probs[row, first:last]
    dist.all_reduce(flat)
    values = flat.cpu().numpy()
    # Copies, so that a sample's values do not keep the memory of all others.
    return [values[start:stop].copy() for start, stop in pairwise(offsets)]
