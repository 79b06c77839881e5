"""Weight sync by handles of shared memory, for servers on the trainer's machines (CUDA IPC): nothing is sent.

On GPUs torch passes CUDA IPC handles, on CPUs the names of files in shared memory; SGLang's
`/update_weights_from_tensor` opens them and each tensor-parallel rank copies its part. Each rank of a server receives
memory of its own GPU, from the trainer rank there, its IPC source rank. Every bucket is gathered on one of a machine's
source ranks, which forward it to each other.
"""

import base64
import io
import time
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from exprl_megatron.errors import UserError
from exprl_megatron.policy.world import World, local_rank
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.groups import host_of, is_local_host
from exprl_megatron.weight_sync.memory_transport import MemoryTransport
from exprl_megatron.weight_sync.rounds import push_rounds
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_exporter import FilledBucket, WeightExporter

Payloads = dict[int, dict[int, str]]
"""For each server, by its number, the handles for its tensor-parallel ranks."""
Chains = tuple[tuple[int, ...], ...]
"""See Transport.source_ranks."""
Place = tuple[str, int]
"""A server's host, and its first GPU there."""


class HandlesTransport(MemoryTransport):
    """See Transport and MemoryTransport. All ranks construct it together.

    Raises UserError on rank 0 (RankZeroFailed elsewhere) where a server's machine has no trainer rank.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        server_tp: int,
        world: World,
        coordinator: RankCoordinator,
        deadline_s: float,
    ):
        super().__init__(clients, server_tp, world, coordinator, deadline_s)
        self.connect(clients)

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Push weights to these servers from now on; releases what was shared with the former ones. A collective."""
        self._clients = list(clients)
        self._sources, self.source_ranks = self._find_sources()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a bucket: uint8 [nbytes], in memory that the servers of this machine can map."""
        buffer = super().allocate(nbytes)
        if buffer.device.type == "cpu":
            with _files_in_shared_memory():
                buffer.share_memory_()
        return buffer

    async def push(self, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        """Send all rounds of `exporter` as `version` and add the seconds to `times`; rank 0 only.

        Raises:
            ServerError: a server refuses, dies or exceeds the deadline.
        """
        count = len(exporter.rounds)

        async def send(number: int, gathered: Payloads | None) -> None:
            started, payloads = time.monotonic(), required(gathered, "the handles of a round")
            final = number == count - 1
            await gather_or_cancel(
                client.update_from_tensor(
                    [payloads[server][rank] for rank in range(self._server_tp)],
                    version=version if final else None,
                    flush_cache=final,
                    deadline_s=self._deadline_s,
                )
                for server, client in enumerate(self._clients)
            )
            times.load_s += time.monotonic() - started

        await push_rounds(
            count,
            self._coordinator,
            self._clients,
            lambda number: self._gather(exporter, number),
            send,
            self._deadline_s,
        )

    def follow(self, exporter: WeightExporter) -> None:
        """Take part in `push` on the other ranks.

        Raises:
            RankZeroFailed: rank 0 has an error.
        """
        for number in range(len(exporter.rounds)):
            self._coordinator.wait_signal()
            self._gather(exporter, number)
        self._coordinator.wait_signal()

    async def close(self) -> None:
        """Release everything on the servers except the weights; rank 0 only."""
        return None

    def follow_close(self) -> None:
        """Take part in `close` on the other ranks."""
        return None

    def _gather(self, exporter: WeightExporter, number: int) -> Payloads | None:
        """Gather all handles of a round on rank 0; a collective."""
        filled = exporter.gather(number)
        own: Payloads = {}
        if filled is not None:
            for server, sources in enumerate(self._sources):
                # Each server rank opens its own handle, since handles count their readers.
                own[server] = {i: _serialized(filled) for i, rank in enumerate(sources) if rank == self._world.rank}
        given = self._coordinator.collect(own)
        if given is None:
            return None
        return {
            server: dict(ChainMap(*(payloads.get(server, {}) for payloads in given)))
            for server in range(len(self._sources))
        }

    def _find_sources(self) -> tuple[list[list[int]], Chains]:
        """Find, for each server rank, the trainer rank that passes memory to it, and these ranks by machine; a
        collective.
        """
        if self._coordinator.is_rank0:
            places = [(host_of(client.url), client.first_gpu) for client in self._clients]
            self._coordinator.signal(places)
        else:
            places = self._coordinator.wait_signal()
        seen = self._coordinator.collect(({host for host, _ in places if is_local_host(host)}, local_rank()))
        if seen is None:
            return self._coordinator.wait_signal()
        with self._coordinator.abort_on_error():
            sources = [
                self._sources_of(client, place, seen) for client, place in zip(self._clients, places, strict=True)
            ]
            found = sources, _chains([host for host, _ in places], sources)
        self._coordinator.signal(found)
        return found

    def _sources_of(self, client: SGLangClient, place: Place, seen: list[tuple[set[str], int]]) -> list[int]:
        """Return, for each rank of a server, the trainer rank on its GPU; without one, a trainer rank on its
        machine.
        """
        host, first_gpu = place
        by_gpu = {gpu: rank for rank, (hosts, gpu) in enumerate(seen) if host in hosts}
        if not by_gpu:
            raise UserError(
                f"sync.transport is handles, but no trainer rank runs on {host}, where {client.name} is; use broadcast."
            )
        local = sorted(by_gpu.values())
        gpus = range(first_gpu, first_gpu + self._server_tp)
        return [by_gpu.get(gpu, local[gpu % len(local)]) for gpu in gpus]


def _chains(hosts: Sequence[str], sources: Sequence[Sequence[int]]) -> Chains:
    """Return the source ranks of each machine; every rank once, even if its machine has several names."""
    chains: dict[str, set[int]] = {}
    for host, ranks in zip(hosts, sources, strict=True):
        known = set().union(*(chain for other, chain in chains.items() if other != host))
        chains.setdefault(host, set()).update(set(ranks) - known)
    return tuple(tuple(sorted(chain)) for chain in chains.values() if chain)


def _serialized(filled: FilledBucket) -> str:
    """Serialize names and handles of a message's tensors for SGLang."""
    written = io.BytesIO()
    with _files_in_shared_memory():
        ForkingPickler(written).dump(filled.named())
    return base64.b64encode(written.getvalue()).decode("ascii")


@contextmanager
def _files_in_shared_memory() -> Iterator[None]:
    """Share CPU tensors by name: file descriptors, torch's default, cannot be passed to a server."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
