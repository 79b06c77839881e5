"""Forward and backward over micro-batches, through whatever pipeline the layout has."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListLike
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from exprl_megatron.algorithms.batch import LearnedFrom, MicroBatch, Sequence, filler, pad
from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.policy.host_group import from_rank
from exprl_megatron.policy.log_probs import response_log_probs
from exprl_megatron.policy.model_input import ModelInput, model_input
from exprl_megatron.policy.packing import Plan, Shape
from exprl_megatron.policy.world import World

Work = tuple[ModelInput, MicroBatch]
"""A micro-batch as the model reads it, and as the loss does."""

LossFunction = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(log_probs [b, l], entropy [b, l], micro-batch) -> (loss sum, {metric: sum}), scalar tensors.

A metric whose name ends in `/max` is a maximum, not a sum.
"""


class MicroBatches:
    """This rank's part of a plan as tensors, each micro-batch made when it is its turn: a step never holds them all."""

    def __init__(self, sequences: ListLike[LearnedFrom], plan: Plan, shape: Shape, world: World):
        self._sequences = sequences
        self._micros = plan[world.dp_rank]
        self._shape = shape
        self._world = world

    def __len__(self) -> int:
        return len(self._micros)

    def __iter__(self) -> Iterator[Work]:
        for rows in self._rows():
            length = max(map(len, rows))
            model = model_input(rows, length, self._shape, self._world.cp_rank)
            yield model.to(self._world.device), pad(rows, length).to(self._world.device)

    @property
    def computed_tokens(self) -> int:
        """Tokens that this rank's model reads in all, padding included."""
        sizes = (sum(self._shape.with_padding([len(sequence) for sequence in rows])) for rows in self._rows())
        return sum(sizes) // self._shape.cp

    def _rows(self) -> Iterator[list[Sequence]]:
        for indices in self._micros:
            yield [self._sequences[index] for index in indices] or [filler(self._sequences)]


def forward_log_probs(
    model: list[torch.nn.Module],
    work: MicroBatches | list[Work],
    config: PolicyConfig,
    vocabulary: int,
    temperature: float,
) -> list[torch.Tensor]:
    """Log-probs [b, l] of each micro-batch on the last pipeline stage, an empty list on the others."""

    def collect(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return output[0]

    with torch.no_grad():
        return _run(model, work, config, vocabulary, temperature, lambda micro: collect, forward_only=True)


def forward_backward(
    model: list[torch.nn.Module],
    work: MicroBatches | list[Work],
    config: PolicyConfig,
    vocabulary: int,
    temperature: float,
    loss_fn: LossFunction,
    denominator: float,
) -> list[dict[str, torch.Tensor]]:
    """Adds the gradients of sum(loss) / denominator; the metrics of each micro-batch on the last stage, else []."""

    def loss_of(micro: MicroBatch):
        def compute(output: torch.Tensor):
            loss, metrics = loss_fn(output[0], output[1], micro)
            # The count that Megatron asks for in the middle is not used: gradients are finalised by the policy.
            return loss / denominator, torch.zeros((), dtype=torch.int, device=loss.device), metrics

        return compute

    return _run(model, work, config, vocabulary, temperature, loss_of, forward_only=False)


def _run(
    model,
    work: MicroBatches | list[Work],
    config: PolicyConfig,
    vocabulary: int,
    temperature: float,
    on_output,
    forward_only,
):
    def output_processor(*, hidden_states, output_layer, output_weight, context: Work, **_):
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

    def forward_step(iterator, chunk):
        tokens, micro = next(iterator)
        output = chunk(
            tokens.input_ids,
            tokens.position_ids,
            None,
            packed_seq_params=_packed(tokens),
            output_processor=output_processor,
            output_processor_context=(tokens, micro),
        )
        return output, on_output(micro)

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


def _packed(tokens: ModelInput) -> PackedSeqParams | None:
    """The padding behind each sequence counts as its own: nothing lies between sequences, and causality hides it."""
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
    """Sums (or maxima) over micro-batches and data-parallel ranks, the same on every rank.

    Ranks of a context-parallel group all have the metrics of their whole micro-batches: they are no part of the sum.
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
        return from_rank(dist.get_world_size() - 1, totals)
    return totals


def share_log_probs(
    sequences: ListLike[LearnedFrom], plan: Plan, collected: list[torch.Tensor], world: World
) -> list[np.ndarray]:
    """From each data-parallel rank's micro-batches to the response log-probs of all sequences, on every rank."""
    offsets = [0, *accumulate(sequence.response_tokens for sequence in sequences)]
    flat = torch.zeros(offsets[-1], dtype=torch.float32, device=world.device)
    if world.last_stage and world.tp_rank == world.cp_rank == 0:
        for indices, log_probs in zip(plan[world.dp_rank], collected, strict=True):
            for row, index in enumerate(indices):
                first, last = sequences[index].prompt_tokens - 1, len(sequences[index]) - 1
                flat[offsets[index] : offsets[index + 1]] = log_probs[row, first:last]
    dist.all_reduce(flat)
    values = flat.cpu().numpy()
    # Copies, so that what a rank keeps of them does not hold all others.
    return [values[start:stop].copy() for start, stop in pairwise(offsets)]
