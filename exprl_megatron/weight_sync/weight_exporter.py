"""Exports the policy's weights message by message: this rank's part in gathering and quantizing each of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from exprl_megatron.models import fp8_blocks as blocks
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Bucket, Parameter
from exprl_megatron.models.shards import sender
from exprl_megatron.policy.gather import Gatherer
from exprl_megatron.policy.world import World
from exprl_megatron.utils.required import required
from exprl_megatron.weight_sync.messages import Message, TensorSlot, rounds, smallest_message, stage_messages

BucketCheck = Callable[[Bucket], None]
"""Called with each bucket's tensors, to hash them."""
_BLOCKS_AT_ONCE = 2**22
_FORWARDED = 2**24
"""Bytes of a message that a chain of ranks forwards at a time."""


@dataclass(frozen=True)
class FilledBucket:
    """A message with its data."""

    message: Message
    data: torch.Tensor
    """[message.nbytes] uint8."""

    def named(self) -> Bucket:
        """Return the tensors under their names: views of `data`."""
        return [(slot.name, view(self.data, slot)) for slot in self.message.slots]


class WeightExporter:
    """One sync's messages. Every rank makes one with the same arguments and calls `gather` for each round in order.

    `source_ranks`: the chains of ranks that need every message, with one message per round. The first rank of a chain
    fills it, and each rank forwards it to the next. None: each pipeline stage's messages are filled on the stage's
    first rank only, and the stages' messages of a round are filled concurrently. `fp8`: matrices are quantized in
    blocks. `allocate` allocates a bucket of a number of bytes; there are two, which alternate between rounds. `check`
    is called with every message on the first rank that fills it, in order, on a thread.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        architecture: Architecture,
        world: World,
        bucket_bytes: int,
        *,
        source_ranks: tuple[tuple[int, ...], ...] | None,
        fp8: bool = False,
        allocate: Callable[[int], torch.Tensor] | None = None,
        check: BucketCheck | None = None,
    ):
        """More than 7 parameters: the model, the buckets, and what the transport chooses about them."""
        self.gatherer = Gatherer(chunks, architecture, world)
        self.architecture = architecture
        self.bucket_bytes = bucket_bytes
        self._world = world
        self._source_ranks = source_ranks
        self._fp8 = fp8
        dtype = str(self.gatherer.dtype).removeprefix("torch.")
        staged = stage_messages(architecture, world.layout, dtype, bucket_bytes, fp8=fp8, grouped=self._cuda)
        if fp8:
            table = [parameter for messages in staged for message in messages for parameter in message.parameters]
            blocks.check_quantizable(table, self.gatherer.shapes, architecture)
        one_by_one: list[tuple[Message, ...]] = [(message,) for messages in staged for message in messages]
        self.rounds: list[tuple[Message, ...]] = rounds(staged) if source_ranks is None else one_by_one
        """The messages that are filled, and may be sent, at the same time."""
        self.smallest_messages = [smallest_message(messages, self.gatherer.shapes, dtype, fp8) for messages in staged]
        """For each pipeline stage, a message of its smallest parameter, which the rounds contain too."""
        self.gather_s = 0.0
        self.quantize_s = 0.0
        self._allocate = allocate or (lambda size: torch.empty(size, dtype=torch.uint8, device=world.device))
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._check = check
        self._gathered = 0
        self._checks: list[Future[None]] = []
        self._checker = ThreadPoolExecutor(1, "checksums")

    @property
    def nbytes(self) -> int:
        """Bytes of all messages."""
        return sum(message.nbytes for messages in self.rounds for message in messages)

    def source_ranks(self, message: Message) -> tuple[tuple[int, ...], ...]:
        """Return the chains of ranks that receive the message."""
        return self._source_ranks or ((sender(message.stage, self._world.layout),),)

    def gather(self, number: int) -> FilledBucket | None:
        """Gather the message of round `number` that is filled on this rank, if there is one; valid for two rounds.

        A collective of all ranks.
        """
        with self._complete():
            filled = self._gather(number)
        self._gathered += 1
        if (
            filled is not None
            and self._check is not None
            and self.source_ranks(filled.message)[0][0] == self._world.rank
        ):
            self._checks.append(self._checker.submit(self._check, filled.named()))
        return filled

    def gather_smallest(self, stage: int) -> FilledBucket | None:
        """Return `smallest_messages[stage]`, on the stage's first rank; a collective of the stage's ranks."""
        message, root = self.smallest_messages[stage], sender(stage, self._world.layout)
        if self._world.rank != root:
            for parameter in message.parameters:
                self.gatherer.collect(parameter, root, None)
            return None
        with self._complete():
            filled = FilledBucket(message, torch.empty(message.nbytes, dtype=torch.uint8, device=self._world.device))
            self._fill(filled)
        return filled

    def drain(self) -> None:
        """Gather the rounds that the transport did not need, for `check`; a collective."""
        for number in range(self._gathered, len(self.rounds) if self._check is not None else 0):
            self.gather(number)

    def wait_checks(self) -> None:
        """Wait until `check` is done with this rank's messages; raises its errors."""
        for check in self._checks:
            check.result()
        self._checker.shutdown()

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """Use this rank's device on CUDA, and wait for the current stream at the end."""
        if not self._cuda:
            yield
            return
        with torch.cuda.device(self._world.device):
            yield
            torch.cuda.current_stream().synchronize()

    @property
    def _cuda(self) -> bool:
        return self._world.device.type == "cuda"

    def _gather(self, number: int) -> FilledBucket | None:
        filled = None
        for message in self.rounds[number]:
            for first, *others in self.source_ranks(message):
                if self._world.rank in (first, *others):
                    filled = FilledBucket(message, self._buffer(number)[: message.nbytes])
                if self._world.rank == first:
                    self._fill(required(filled, "the message that this rank fills"))
                else:
                    for parameter in message.parameters:
                        self.gatherer.collect(parameter, first, None)
            for chain in self.source_ranks(message):
                if self._world.rank in chain:
                    forward_along(required(filled, "the message of this rank").data, chain, self._world.rank)
        return filled

    def _buffer(self, number: int) -> torch.Tensor:
        """Return the buffer for round `number`, after its previous reader is done."""
        mine = [m.nbytes for messages in self.rounds for m in messages if self._fills(m)]
        buffer = self._buffers[number % 2]
        if buffer is None:
            buffer = self._buffers[number % 2] = self._allocate(max(mine))
        for check in self._checks[:-1]:
            check.result()
        return buffer

    def _fills(self, message: Message) -> bool:
        return any(self._world.rank in chain for chain in self.source_ranks(message))

    def _fill(self, filled: FilledBucket) -> None:
        started, quantized = time.monotonic(), self.quantize_s
        views = dict(filled.named())
        for parameter in filled.message.parameters:
            into = [self._destination(views, name) for name in parameter.hf_names]
            self.gatherer.collect(parameter, self._world.rank, into)
            self._quantize(parameter, into, views)
        self.gather_s += time.monotonic() - started - (self.quantize_s - quantized)

    def _destination(self, views: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """Return where a full tensor is assembled: its slot in the message, or a buffer where it is quantized first."""
        if name + blocks.SCALE not in views:
            return views[name]
        return torch.empty(views[name].shape, dtype=self.gatherer.dtype, device=self._world.device)

    def _quantize(self, parameter: Parameter, full: Sequence[torch.Tensor], views: dict[str, torch.Tensor]) -> None:
        started = time.monotonic()
        for name, tensor in zip(parameter.hf_names, full, strict=True):
            if name + blocks.SCALE in views:
                quantize_into(tensor, views[name], views[name + blocks.SCALE])
        self.quantize_s += time.monotonic() - started


def forward_along(data: torch.Tensor, chain: Sequence[int], rank: int) -> None:
    """Send `data`, uint8 [bytes], from the chain's first rank to the others, in pieces that each rank forwards on
    arrival.
    """
    place = chain.index(rank)
    for piece in data.split(_FORWARDED):
        if place > 0:
            dist.recv(piece, src=chain[place - 1])
        if place < len(chain) - 1:
            dist.send(piece, dst=chain[place + 1])


def quantize_into(weight: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantize `weight` [rows, columns] into `values` and `scales`, few rows at a time to bound memory."""
    rows = max(1, _BLOCKS_AT_ONCE // (weight.shape[1] * blocks.BLOCK)) * blocks.BLOCK
    for start in range(0, weight.shape[0], rows):
        part, scale = blocks.quantize(weight[start : start + rows])
        values[start : start + rows].copy_(part)
        first = start // blocks.BLOCK
        scales[first : first + len(scale)].copy_(scale)


def view(data: torch.Tensor, slot: TensorSlot) -> torch.Tensor:
    """Return a view of the tensor of `slot`, in its shape and dtype, in a message's bytes, uint8 [bytes]."""
    stop = slot.start + slot.nbytes
    return data[slot.start : stop].view(getattr(torch, slot.dtype)).view(torch.Size(slot.shape))
