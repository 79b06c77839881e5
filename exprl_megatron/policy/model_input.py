"""What the model reads of a micro-batch: padded rows, or one row of all its packed sequences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.policy.context_parallel import own_columns
from exprl_megatron.policy.packing import PackingShape


@dataclass(frozen=True)
class ModelInput:
    """The tokens of a micro-batch that one context-parallel rank computes.

    A micro-batch's losses see [batch, length] tables (MicroBatch); `places` and `slots` tell which of the model's
    outputs belong where in them: only tokens before a response token have an output that anyone asks for.
    """

    input_ids: torch.Tensor
    """[rows, columns], int64."""
    position_ids: torch.Tensor
    """[rows, columns], int64: each sequence begins at 0."""
    places: torch.Tensor
    """[n], int64: rows of the hidden states [columns, rows, hidden], flattened to [columns * rows, hidden]."""
    slots: torch.Tensor
    """[n], int64: where their log-probs belong in the flattened [batch * length] of the micro-batch."""
    cu_seqlens: torch.Tensor | None
    """[sequences + 1], int32: where each sequence begins in the packed row of all ranks, and its end; None: padded."""
    longest: int
    """Tokens of the longest sequence, with its padding."""
    routed_experts: torch.Tensor | None = None
    """What the routers take (see routed_rows); None: they choose."""

    def to(self, device: torch.device) -> "ModelInput":
        """Return the same input on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def model_input(sequences: Sequence[TrainSample], length: int, shape: PackingShape, cp_rank: int = 0) -> ModelInput:
    """Return the input for `sequences` as `shape` lays them out; `length` is the micro-batch's, at least the
    longest's.
    """
    lengths = shape.with_padding([len(sequence) for sequence in sequences])
    begins = np.cumsum([0, *lengths])
    ids = np.zeros(begins[-1], dtype=np.int64)
    slots = np.full(begins[-1], -1, dtype=np.int64)
    for row, (sequence, begin) in enumerate(zip(sequences, begins[:-1], strict=True)):
        ids[begin : begin + sequence.prompt_tokens] = sequence.prompt_ids
        ids[begin + sequence.prompt_tokens : begin + len(sequence)] = sequence.response_ids
        first, last = sequence.prompt_tokens - 1, len(sequence) - 1
        slots[begin + first : begin + last] = np.arange(row * length + first, row * length + last)
    positions = np.arange(begins[-1]) - np.repeat(begins[:-1], lengths)
    rows = 1 if shape.packed else len(sequences)
    own = own_columns(lengths if shape.packed else lengths[:1], shape.cp, cp_rank)
    input_ids, position_ids, own_slots = (
        torch.from_numpy(values).view(rows, -1)[:, own].contiguous() for values in (ids, positions, slots)
    )
    flat = own_slots.T.flatten()
    places = (flat >= 0).nonzero()[:, 0]
    cu_seqlens = torch.from_numpy(begins).int() if shape.packed else None
    return ModelInput(input_ids, position_ids, places, flat[places], cu_seqlens, max(lengths))
