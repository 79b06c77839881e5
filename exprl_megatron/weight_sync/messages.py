"""Plans what a weight sync sends: messages, their bytes, and the ranks that hold the shards.

Pure arithmetic on the table of names: no process group, no weights. The transports follow it, and the plan of a
sync at any size is computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from exprl_megatron.config.policy import Layout
from exprl_megatron.models import fp8_blocks as blocks
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Parameter, dtype_of, hf_shapes, parameters
from exprl_megatron.models.shards import ITEMSIZE, Shape, holders, is_contiguous_shard, shard_shape, split_into_buckets


@dataclass(frozen=True)
class TensorSlot:
    """The position of one tensor in the bytes of a message."""

    name: str
    """Hugging Face's name of the tensor."""
    dtype: str
    """As in `str(tensor.dtype)` without `torch.`."""
    shape: Shape
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Message:
    """Whole parameters whose Hugging Face tensors are contiguous in one buffer."""

    stage: int
    """The pipeline stage that has the parameters."""
    parameters: tuple[Parameter, ...]
    slots: tuple[TensorSlot, ...]
    """Sorted so that each tensor is aligned to the size of its elements; without gaps."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.nbytes for slot in self.slots)


def stage_messages(
    architecture: Architecture,
    layout: Layout,
    dtype: str,
    bucket_bytes: int,
    *,
    fp8: bool = False,
    grouped: bool = False,
) -> list[list[Message]]:
    """Cut each pipeline stage's exported parameters, in the order of the model, into messages.

    A message, together with the scratch memory that its sender needs to fill it, has at most `bucket_bytes` (more where
    a single parameter has more). `fp8`: matrices are sent in blocks of 128 x 128 with their scales. `grouped` is as in
    names.parameters.
    """
    shapes = hf_shapes(architecture)
    staged: list[list[Parameter]] = [[] for _ in range(layout.pp)]
    for parameter in parameters(architecture, layout, grouped):
        if parameter.exported:
            staged[parameter.pp_rank].append(parameter)
    made = []
    for stage, table in enumerate(staged):
        scratch = max(scratch_bytes(parameter, shapes, layout, dtype, fp8) for parameter in table)
        cuts = split_into_buckets(
            table, lambda parameter: _sent_bytes(parameter, shapes, dtype, fp8), bucket_bytes - scratch
        )
        made.append([_message(stage, cut, shapes, dtype, fp8) for cut in cuts])
    return made


def smallest_message(messages: Sequence[Message], shapes: dict[str, Shape], dtype: str, fp8: bool = False) -> Message:
    """Return the parameter of `messages` with the fewest bytes, as a message of its own."""
    table = [parameter for message in messages for parameter in message.parameters]
    least = min(table, key=lambda parameter: _sent_bytes(parameter, shapes, dtype, fp8))
    return _message(messages[0].stage, [least], shapes, dtype, fp8)


def rounds(staged: Sequence[Sequence[Message]]) -> list[tuple[Message, ...]]:
    """Return, for each n, the n-th messages of all stages that have one: these are in flight together."""
    return [tuple(m for m in messages if m is not None) for messages in zip_longest(*staged)]


def scratch_bytes(parameter: Parameter, shapes: dict[str, Shape], layout: Layout, dtype: str, fp8: bool = False) -> int:
    """Return the bytes of scratch memory that the sender needs while it fills in this parameter.

    That is another rank's shard where its parts are not contiguous in the message, and with `fp8` the whole parameter
    before it is quantized.
    """
    count = len(holders(parameter, layout))
    apart = any(not is_contiguous_shard(parameter, shapes, layout, index) for index in range(1, count))
    shard = math.prod(shard_shape(parameter, shapes, layout)) if apart else 0
    blocked = [shapes[name] for name in parameter.hf_names if fp8 and blocks.is_quantized(name, shapes[name])]
    return ITEMSIZE[dtype] * (shard + sum(map(math.prod, blocked)))


def _message(stage: int, cut: list[Parameter], shapes: dict[str, Shape], dtype: str, fp8: bool) -> Message:
    sent = [tensor for parameter in cut for tensor in _sent(parameter, shapes, dtype, fp8)]
    sent.sort(key=lambda tensor: -ITEMSIZE[tensor[1]])
    slots, start = [], 0
    for name, kind, shape in sent:
        slots.append(TensorSlot(name, kind, shape, start))
        start += slots[-1].nbytes
    return Message(stage, tuple(cut), tuple(slots))


def _sent_bytes(parameter: Parameter, shapes: dict[str, Shape], dtype: str, fp8: bool) -> int:
    return sum(math.prod(shape) * ITEMSIZE[kind] for _, kind, shape in _sent(parameter, shapes, dtype, fp8))


def _sent(parameter: Parameter, shapes: dict[str, Shape], dtype: str, fp8: bool) -> list[tuple[str, str, Shape]]:
    """Return (name, dtype, shape) of the tensors that are sent for a parameter."""
    found = []
    for name in parameter.hf_names:
        shape = shapes[name]
        if fp8 and blocks.is_quantized(name, shape):
            found.append((name, "float8_e4m3fn", shape))
            found.append((name + blocks.SCALE, "float32", tuple(-(-size // blocks.BLOCK) for size in shape)))
        else:
            found.append((name, dtype_of(name, dtype), shape))
    return found
