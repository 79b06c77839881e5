"""The experts that this rank's routers take for a micro-batch, cut as the model's input and its layers are cut."""

from collections.abc import Sequence

import numpy as np
import torch

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy.context_parallel import own_columns
from exprl_megatron.policy.packing import PackingShape
from exprl_megatron.policy.world import World


def routed_rows(
    sequences: Sequence[TrainSample], shape: PackingShape, routing: Routing, layers: Sequence[int], world: World
) -> torch.Tensor:
    """Return [tokens, layers, top_k], uint8 or int16: the experts of every token that this rank's routers see.

    `layers` are those of the rank, counted from 0 over the whole model. The tokens are in the order of the hidden
    states [columns, rows, hidden] that `model_input` leads to, flattened: of the rank's columns under context
    parallelism those of its sequence-parallel part.
    """
    lengths = shape.with_padding([len(sequence) for sequence in sequences])
    begins = np.cumsum([0, *lengths])
    experts = _any_experts(int(begins[-1]), len(layers), routing)
    for sequence, begin in zip(sequences, begins[:-1], strict=True):
        chosen = stage_experts(sequence, layers)
        if chosen is not None:
            experts[begin : begin + len(chosen)] = chosen
    rows = 1 if shape.packed else len(sequences)
    own = own_columns(lengths if shape.packed else lengths[:1], shape.cp, world.cp_rank)
    if world.layout.sequence_parallel:
        own = own.chunk(world.layout.tp)[world.tp_rank]
    table = torch.from_numpy(experts).view(rows, -1, len(layers), routing.top_k)[:, own]
    return table.transpose(0, 1).flatten(0, 1)


def stage_experts(sample: TrainSample, layers: Sequence[int]) -> np.ndarray | None:
    """Return [tokens - 1, layers, top_k]: the experts of `sample` for `layers`, which are among its own; None: it has
    none.
    """
    if sample.routed_experts is None:
        return None
    own = sample.routed_layers or tuple(range(sample.routed_experts.shape[1]))
    if own == tuple(layers):
        # This rank received only its stage's layers; a copy in each pass would be of most of the bytes of a step.
        return sample.routed_experts
    return sample.routed_experts[:, [own.index(layer) for layer in layers]]


def _any_experts(tokens: int, layers: int, routing: Routing) -> np.ndarray:
    """Return [tokens, layers, top_k]: distinct experts for each token, all of them equally often.

    For padding and for the last token of a sequence, which the server has sampled and never read; no log-prob depends
    on them.
    """
    ids = np.arange(tokens * routing.top_k).reshape(tokens, 1, routing.top_k) % routing.experts
    return np.repeat(ids.astype(routing.dtype), layers, axis=1)
