"""Weights by handles of memory that trainer and servers of one machine share: nothing is sent.

On GPUs torch hands over CUDA IPC handles, on CPUs the names of files in shared memory; SGLang's
`/update_weights_from_tensor` opens them and each tensor-parallel rank copies its part. On each machine with servers the
first trainer rank there is the giver: every bucket is filled on all givers.
"""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from urllib.parse import urlsplit

import torch
import torch.multiprocessing

from exprl_megatron.errors import UserError
from exprl_megatron.policy.world import World
from exprl_megatron.resharding.control import Control
from exprl_megatron.resharding.groups import is_here
from exprl_megatron.resharding.outgoing import Filled, Outgoing
from exprl_megatron.resharding.rounds import push_rounds
from exprl_megatron.resharding.timing import SyncTimes
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.together import together

Payloads = dict[int, list[str]]
"""For each server, by its number, what its tensor-parallel ranks are handed."""


class HandlesTransport:
    """See Transport. Made by all ranks together; `clients` are needed on rank 0 alone.

    Raises UserError on rank 0 (SyncStopped elsewhere) where a server's machine has no trainer rank.
    """

    def __init__(
        self, clients: Sequence[SGLangClient], server_tp: int, world: World, control: Control, deadline_s: float
    ):
        self._server_tp = server_tp
        self._world = world
        self._control = control
        self._deadline_s = deadline_s
        self.enlist(clients)

    def enlist(self, clients: Sequence[SGLangClient]) -> None:
        self._clients = list(clients)
        self._givers = self._find_givers()
        self.fillers = tuple(sorted(set(self._givers)))

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
            await together(
                client.update_from_tensor(
                    payloads[server],
                    version=version if final else None,
                    flush_cache=final,
                    deadline_s=self._deadline_s,
                )
                for server, client in enumerate(self._clients)
            )
            times.load_s += time.monotonic() - started

        await push_rounds(count, self._control, self._clients, lambda number: self._gather(outgoing, number), send)

    def follow(self, outgoing: Outgoing) -> None:
        for number in range(len(outgoing.rounds)):
            self._control.await_go()
            self._gather(outgoing, number)
        self._control.await_go()

    async def close(self) -> None:
        return None

    def follow_close(self) -> None:
        return None

    def _gather(self, outgoing: Outgoing, number: int) -> Payloads | None:
        """All givers' handles of a round, on rank 0."""
        filled = outgoing.gather(number)
        own: Payloads = {}
        if filled is not None:
            servers = [server for server, giver in enumerate(self._givers) if giver == self._world.rank]
            # Each opens a handle of its own: their counts of who still reads must not mix.
            own = {server: [_serialised(filled) for _ in range(self._server_tp)] for server in servers}
        given = self._control.collect(own)
        return None if given is None else {k: v for payloads in given for k, v in payloads.items()}

    def _find_givers(self) -> list[int]:
        """For each server the first rank on its machine."""
        if self._control.here:
            self._control.go([urlsplit(client.url).hostname for client in self._clients])
            hosts = [urlsplit(client.url).hostname for client in self._clients]
        else:
            hosts = self._control.await_go()
        local = self._control.collect([is_here(host) for host in hosts])
        if not self._control.here:
            return self._control.await_go()
        with self._control.leading():
            givers = []
            for host, client, here in zip(hosts, self._clients, zip(*local, strict=True), strict=True):
                if not any(here):
                    raise UserError(
                        f"sync.transport is handles, but no trainer rank runs on {host}, where {client.name} is; use "
                        f"broadcast."
                    )
                givers.append(here.index(True))
        self._control.go(givers)
        return givers


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
