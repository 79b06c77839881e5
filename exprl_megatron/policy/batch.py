"""What the trainer learns from: sequences, and what losses see of them: micro-batches of padded tensors."""

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Sequence:
    """A prompt and its response, with one number per response token for everything the loss needs.

    All tuples but `prompt_ids` have the response's length; None stands for "not used by this loss".
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    advantages: tuple[float, ...] | None = None
    sampler_log_probs: tuple[float, ...] | None = None
    old_log_probs: tuple[float, ...] | None = None
    """None: strictly on-policy, the old log-probs are the current ones, detached."""
    start_log_probs: tuple[float, ...] | None = None
    """Under the frozen starting policy, for the KL term."""
    fresh: tuple[float, ...] | None = None
    """1.0 where the weights that learn sampled the token themselves, 0.0 where older ones did; None: they did all."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded tensors of shape [batch, length], a row for each sequence, however the model reads it.

    targets[i, j] is the token after the j-th of sequence i; `mask` is 1.0 where that is a response token. The
    optional tensors are aligned with targets.
    """

    targets: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor | None
    sampler_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor | None
    start_log_probs: torch.Tensor | None
    fresh: torch.Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return MicroBatch(**{name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()})


PER_TOKEN = ("advantages", "sampler_log_probs", "old_log_probs", "start_log_probs", "fresh")


def pad(sequences: ListLike[Sequence], length: int, pad_id: int = 0) -> MicroBatch:
    """`sequences` (at most `length` tokens each) as one micro-batch of that padded length."""
    shape = (len(sequences), length)
    targets = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape)
    optional = {name: torch.zeros(shape) for name in PER_TOKEN if _given(sequences, name)}
    for row, sequence in enumerate(sequences):
        tokens = torch.tensor(sequence.prompt_ids + sequence.response_ids)
        first, last = len(sequence.prompt_ids) - 1, len(tokens) - 1
        targets[row, :last] = tokens[1:]
        mask[row, first:last] = 1.0
        for name, tensor in optional.items():
            tensor[row, first:last] = torch.tensor(getattr(sequence, name))
    return MicroBatch(targets, mask, **{name: optional.get(name) for name in PER_TOKEN})


def filler(sequences: ListLike[Sequence]) -> Sequence:
    """A sequence without response that fits into a micro-batch beside `sequences` and adds nothing to any sum."""
    return Sequence((0,), (), **{name: () for name in PER_TOKEN if _given(sequences, name)})


def _given(sequences: ListLike[Sequence], name: str) -> bool:
    given = [getattr(sequence, name) is not None for sequence in sequences]
    if any(given) and not all(given):
        raise ValueError(f"{name} is given for some sequences of a batch and missing for others")
    return any(given)
