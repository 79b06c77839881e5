"""Weights by handles of memory that trainer and servers of one machine share: nothing is sent.

On GPUs torch hands over CUDA IPC handles, on CPUs the names of files in shared memory; SGLang's
`/update_weights_from_tensor` opens them and each tensor-parallel rank copies its part. Each rank of a server is handed
memory of its own GPU, by the trainer rank there, its IPC source rank. Every bucket is gathered on one of a machine's
source ranks, which hand it on to each other.
"""

import base64
import io
import time
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from urllib.parse import urlsplit

import torch
import torch.multiprocessing

from exprl_megatron.errors import UserError
from exprl_megatron.policy.world import World, local_rank
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.groups import is_here
from exprl_megatron.weight_sync.outgoing import Filled, Outgoing
from exprl_megatron.weight_sync.rounds import push_rounds
from exprl_megatron.weight_sync.timing import SyncTimes

Payloads = dict[int, dict[int, str]]
"""For each server, by its number, what its tensor-parallel ranks are handed."""
Chains = tuple[tuple[int, ...], ...]
"""See Transport.fillers."""
Place = tuple[str, int]
"""A server's host, and its first GPU there."""


class HandlesTransport:
    """See Transport. Made by all ranks together; `clients` are needed on rank 0 alone.

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
        self._server_tp = server_tp
        self._world = world
        self._coordinator = coordinator
        self._deadline_s = deadline_s
        self.connect(clients)

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        self._clients = list(clients)
        self._sources, self.fillers = self._find_sources()

    def allocate(self, nbytes: int) -> torch.Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._world.device)
        if buffer.device.type == "cpu":
            with _files_in_shared_memory():
                buffer.share_memory_()
        return buffer

    async def push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        count = len(outgoing.rounds)

        async def send(number: int, payloads: Payloads) -> None:
            started = time.monotonic()
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
            lambda number: self._gather(outgoing, number),
            send,
            self._deadline_s,
        )

    def follow(self, outgoing: Outgoing) -> None:
        for number in range(len(outgoing.rounds)):
            self._coordinator.wait_signal()
            self._gather(outgoing, number)
        self._coordinator.wait_signal()

    async def close(self) -> None:
        return None

    def follow_close(self) -> None:
        return None

    def _gather(self, outgoing: Outgoing, number: int) -> Payloads | None:
        """All handles of a round, on rank 0."""
        filled = outgoing.gather(number)
        own: Payloads = {}
        if filled is not None:
            for server, sources in enumerate(self._sources):
                # Each opens a handle of its own: their counts of who still reads must not mix.
                own[server] = {i: _serialised(filled) for i, rank in enumerate(sources) if rank == self._world.rank}
        given = self._coordinator.collect(own)
        if given is None:
            return None
        return {
            server: dict(ChainMap(*(payloads.get(server, {}) for payloads in given)))
            for server in range(len(self._sources))
        }

    def _find_sources(self) -> tuple[list[list[int]], Chains]:
        """For each server the trainer rank that hands memory to each of its ranks; and these of each machine."""
        if self._coordinator.is_rank0:
            places = [(urlsplit(client.url).hostname, client.first_gpu) for client in self._clients]
            self._coordinator.signal(places)
        else:
            places = self._coordinator.wait_signal()
        seen = self._coordinator.collect(({host for host, _ in places if is_here(host)}, local_rank()))
        if not self._coordinator.is_rank0:
            return self._coordinator.wait_signal()
        with self._coordinator.abort_on_error():
            sources = [
                self._sources_of(client, place, seen) for client, place in zip(self._clients, places, strict=True)
            ]
            found = sources, _chains([host for host, _ in places], sources)
        self._coordinator.signal(found)
        return found

    def _sources_of(self, client: SGLangClient, place: Place, seen: list[tuple[set[str], int]]) -> list[int]:
        """For each rank of a server the trainer rank on its GPU, or, where none is, one of those on its machine."""
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
    """The source ranks of each machine, every rank once whatever names its machine has."""
    chains: dict[str, set[int]] = {}
    for host, ranks in zip(hosts, sources, strict=True):
        known = set().union(*(chain for other, chain in chains.items() if other != host))
        chains.setdefault(host, set()).update(set(ranks) - known)
    return tuple(tuple(sorted(chain)) for chain in chains.values() if chain)


def _serialised(filled: Filled) -> str:
    """Names and handles of a message's tensors, as SGLang reads them."""
    written = io.BytesIO()
    with _files_in_shared_memory():
        ForkingPickler(written).dump(filled.named())
    return base64.b64encode(written.getvalue()).decode("ascii")


@contextmanager
def _files_in_shared_memory() -> Iterator[None]:
    """CPU tensors are shared by name: open files, torch's default, cannot be handed to a server."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
