"""What the trainer learns from: sequences, and what losses see of them: micro-batches of padded tensors."""

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch

from exprl_megatron.utils.array_fields import ArrayFields


@dataclass(frozen=True, eq=False)
class Sequence(ArrayFields):
    """A prompt and its response, with one number per response token for everything the loss needs.

    All arrays but `prompt_ids` have the response's length; None stands for "not used by this loss". Anything like an
    array may be given for them.
    """

    prompt_ids: np.ndarray
    """[prompt tokens], int32."""
    response_ids: np.ndarray
    """[response tokens], int32."""
    advantages: np.ndarray | None = None
    """float32, like the log-probs."""
    sampler_log_probs: np.ndarray | None = None
    old_log_probs: np.ndarray | None = None
    """None: strictly on-policy, the old log-probs are the current ones, detached."""
    start_log_probs: np.ndarray | None = None
    """Under the frozen starting policy, for the KL term."""
    fresh: np.ndarray | None = None
    """bool: whether the weights that learn sampled the token themselves, and not older ones; None: they did all."""

    def __post_init__(self) -> None:
        self._hold(np.int32, "prompt_ids", "response_ids")
        self._hold(np.float32, "advantages", "sampler_log_probs", "old_log_probs", "start_log_probs")
        self._hold(np.bool_, "fresh")
        for name in PER_TOKEN:
            value = getattr(self, name)
            if value is not None and len(value) != self.response_tokens:
                raise ValueError(f"{name} has {len(value)} values for a response of {self.response_tokens} tokens")

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """[tokens], int32: prompt and response."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    @property
    def prompt_tokens(self) -> int:
        """How many there are."""
        return len(self.prompt_ids)

    @property
    def response_tokens(self) -> int:
        """How many there are."""
        return len(self.response_ids)

    @property
    def given(self) -> frozenset[str]:
        """Names of the numbers that there are for each response token."""
        return frozenset(name for name in PER_TOKEN if getattr(self, name) is not None)

    @property
    def outline(self) -> "Outline":
        """What ranks know of it that do not learn from it."""
        return Outline(self.prompt_tokens, self.response_tokens, self.given)

    def with_values(self, name: str, values: np.ndarray) -> Self:
        """The same with `values` [response tokens] for its `name`."""
        return replace(self, **{name: values})


@dataclass(frozen=True)
class Outline:
    """A sequence that other ranks learn from; here it counts in denominators, and in the plan of micro-batches."""

    prompt_tokens: int
    response_tokens: int
    given: frozenset[str]

    def __len__(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def with_values(self, name: str, values: np.ndarray) -> Self:
        """As Sequence.with_values; only that there are values is kept."""
        return replace(self, given=self.given | {name})


LearnedFrom = Sequence | Outline
"""A sequence of an update: whole on the ranks that learn from it."""


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
    targets = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.float32)
    optional = {name: np.zeros(shape, dtype=np.float32) for name in PER_TOKEN if _given(sequences, name)}
    for row, sequence in enumerate(sequences):
        first, last = sequence.prompt_tokens - 1, len(sequence) - 1
        targets[row, :first] = sequence.prompt_ids[1:]
        targets[row, first:last] = sequence.response_ids
        mask[row, first:last] = 1.0
        for name, values in optional.items():
            values[row, first:last] = getattr(sequence, name)
    tensors = {name: torch.from_numpy(values) for name, values in optional.items()}
    return MicroBatch(
        torch.from_numpy(targets), torch.from_numpy(mask), **{name: tensors.get(name) for name in PER_TOKEN}
    )


def filler(sequences: ListLike[LearnedFrom]) -> Sequence:
    """A sequence without response that fits into a micro-batch beside `sequences` and adds nothing to any sum."""
    return Sequence((0,), (), **{name: () for name in PER_TOKEN if _given(sequences, name)})


def _given(sequences: ListLike[LearnedFrom], name: str) -> bool:
    given = [name in sequence.given for sequence in sequences]
    if any(given) and not all(given):
        raise ValueError(f"{name} is given for some sequences of a batch and missing for others")
    return any(given)
