"""Training samples (a prompt, its response and per-token values) and the padded micro-batches that losses read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch

from exprl_megatron.utils.array_fields import ArrayFields
from exprl_megatron.utils.routed_experts_array import routed_experts_array


@dataclass(frozen=True, eq=False)
class TrainSample(ArrayFields):
    """A prompt and its response, with one value per response token for each input of the loss.

    Every array except `prompt_ids` and `routed_experts` has the length of the response; None means that the loss does
    not use it. Array-likes are converted.

    Raises:
        ValueError: a per-token array has another length than the response.
    """

    prompt_ids: np.ndarray
    """[prompt tokens], int32."""
    response_ids: np.ndarray
    """[response tokens], int32."""
    advantages: np.ndarray | None = None
    """[response tokens], float32, like the three arrays of log-probs."""
    rollout_log_probs: np.ndarray | None = None
    """Log-probs that the sampling server reported, in nats."""
    old_log_probs: np.ndarray | None = None
    """Log-probs before the step's first update. None: strictly on-policy, the loss uses the current ones, detached."""
    ref_log_probs: np.ndarray | None = None
    """Log-probs under the reference policy (the frozen weights of the stage's start), for the KL term."""
    on_policy_mask: np.ndarray | None = None
    """[response tokens], bool: True where the current weights sampled the token, False where older ones did. None: the
    current weights sampled every token."""
    routed_experts: np.ndarray | None = None
    """[tokens - 1, layers, top_k], uint8 or int16: the experts that the sampling server chose for each token, which the
    trainer then uses (router replay). None: the trainer's routers choose."""
    routed_layers: tuple[int, ...] | None = None
    """The model's layers, counted from 0, that `routed_experts` has, in its order. None: all of them."""
    place: tuple[int, int] | None = None
    """Group and sample of the trace in the rollout log; None: the sample is not from the log."""

    def __post_init__(self) -> None:
        self._hold(np.int32, "prompt_ids", "response_ids")
        self._hold(np.float32, "advantages", "rollout_log_probs", "old_log_probs", "ref_log_probs")
        self._hold(np.bool_, "on_policy_mask")
        object.__setattr__(self, "routed_experts", routed_experts_array(self.routed_experts, len(self)))
        layers, experts = self.routed_layers, self.routed_experts
        if layers is not None and (experts is None or experts.shape[1] != len(layers)):
            raise ValueError(f"routed_experts does not have the {len(layers)} layers of routed_layers")
        for name in PER_TOKEN:
            value = getattr(self, name)
            if value is not None and len(value) != self.response_tokens:
                raise ValueError(f"{name} has {len(value)} values for a response of {self.response_tokens} tokens")

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """Prompt and response, int32 [tokens]."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def response_tokens(self) -> int:
        """Number of tokens of the response."""
        return len(self.response_ids)

    @property
    def token_fields(self) -> frozenset[str]:
        """Names of the per-token arrays that are set."""
        return frozenset(name for name in PER_TOKEN if getattr(self, name) is not None)

    @property
    def outline(self) -> "SampleOutline":
        """The part of the sample that the other ranks need, which do not learn from it."""
        return SampleOutline(
            self.prompt_tokens, self.response_tokens, self.token_fields, has_routed_experts=self.has_routed_experts
        )

    @property
    def has_routed_experts(self) -> bool:
        """Whether the sampling server's choice of experts is known."""
        return self.routed_experts is not None

    def with_values(self, name: str, values: np.ndarray) -> Self:
        """Return a copy in which the per-token array `name` is `values`, float32 or bool [response tokens]."""
        changed: dict[str, Any] = {name: values}
        return replace(self, **changed)


@dataclass(frozen=True)
class SampleOutline:
    """A sample that other ranks learn from: its size, for denominators and for the plan of micro-batches."""

    prompt_tokens: int
    response_tokens: int
    token_fields: frozenset[str]
    has_routed_experts: bool = False

    def __len__(self) -> int:
        return self.prompt_tokens + self.response_tokens

    def with_values(self, name: str, values: np.ndarray) -> Self:
        """Return a copy with the per-token array `name`; of its `values` [response tokens] only the name is stored."""
        return replace(self, token_fields=self.token_fields | {name})


SampleOrOutline = TrainSample | SampleOutline
"""A sample of an update: complete on the ranks that learn from it, an outline on the others."""


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded tensors of shape [B, T], one row for each sample, whether or not the model packs the samples.

    targets[i, j] is the token after the j-th token of sample i; `mask` is 1.0 where that is a response token. The
    optional tensors are aligned with `targets`.
    """

    targets: torch.Tensor  # [B, T], int64
    mask: torch.Tensor  # [B, T], float32, like all below
    advantages: torch.Tensor | None
    rollout_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor | None
    ref_log_probs: torch.Tensor | None
    on_policy_mask: torch.Tensor | None = None
    places: torch.Tensor | None = None  # [B, 2], int32: group and sample of each row in the rollout log

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on `device`."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in given.items() if tensor is not None})


LossFunction = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(log_probs [B, T], entropy [B, T], micro-batch) -> (loss sum, {metric: detached sum}), scalar tensors.

A metric whose name ends in `/max` is a maximum instead of a sum.
"""

PER_TOKEN = ("advantages", "rollout_log_probs", "old_log_probs", "ref_log_probs", "on_policy_mask")


def pad(samples: Sequence[TrainSample], length: int, pad_id: int = 0) -> MicroBatch:
    """Pad `samples` to one micro-batch [B, length].

    Args:
        samples: B samples of at most `length` tokens each.
        length: number of tokens of each row.
        pad_id: token id of the padding.

    Raises:
        ValueError: a per-token array is given for only some of the samples.
    """
    shape = (len(samples), length)
    targets = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.float32)
    optional = {name: np.zeros(shape, dtype=np.float32) for name in PER_TOKEN if _is_set(samples, name)}
    for row, sample in enumerate(samples):
        # The log-prob of a token is predicted one position earlier.
        first, last = sample.prompt_tokens - 1, len(sample) - 1
        targets[row, :first] = sample.prompt_ids[1:]
        targets[row, first:last] = sample.response_ids
        mask[row, first:last] = 1.0
        for name, values in optional.items():
            values[row, first:last] = getattr(sample, name)
    tensors = {name: torch.from_numpy(values) for name, values in optional.items()}
    advantages, rollout, old, ref, on_policy = (tensors.get(name) for name in PER_TOKEN)
    places = [sample.place for sample in samples if sample.place is not None]
    return MicroBatch(
        torch.from_numpy(targets),
        torch.from_numpy(mask),
        advantages,
        rollout,
        old,
        ref,
        on_policy,
        torch.tensor(places, dtype=torch.int32) if len(places) == len(samples) else None,
    )


def dummy_sample(samples: Sequence[SampleOrOutline]) -> TrainSample:
    """Build a sample without a response, with the same per-token fields as `samples`, that adds 0 to every sum.

    Raises:
        ValueError: a per-token array is given for only some of the samples.
    """
    none = np.empty(0)
    given: dict[str, Any] = {name: none for name in PER_TOKEN if _is_set(samples, name)}
    return replace(TrainSample(np.zeros(1, np.int32), np.empty(0, np.int32)), **given)


def replays_routing(samples: Sequence[SampleOrOutline]) -> bool:
    """Return whether the samples have the sampling server's choice of experts.

    Raises:
        ValueError: only some of the samples have it.
    """
    present = [sample.has_routed_experts for sample in samples]
    if any(present) and not all(present):
        raise ValueError("routed_experts is given for some samples of a batch and missing for others")
    return any(present)


def _is_set(samples: Sequence[SampleOrOutline], name: str) -> bool:
    """Return whether the samples have the per-token array `name`; raises ValueError where only some of them have it."""
    present = [name in sample.token_fields for sample in samples]
    if any(present) and not all(present):
        raise ValueError(f"{name} is given for some samples of a batch and missing for others")
    return any(present)
