"""Weights by a broadcast group: gloo between CPU processes, NCCL between GPUs.

The group is SGLang's own (`/init_weights_update_group`): rank 0 is the conductor, and each server
takes as many ranks as its tensor parallelism has.
"""

import asyncio
import uuid
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,
    _world,
    rendezvous,
)

from exprl_megatron.errors import ServerError
from exprl_megatron.resharding.transport import Bucket, with_last
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.ports import free_ports

_POLL_S = 0.001


class BroadcastTransport:
    """See Transport. `server_tp` is the tensor parallelism of each server."""

    def __init__(self, clients: Sequence[SGLangClient], server_tp: int, deadline_s: float, address: str = "127.0.0.1"):
        self._clients = clients
        self._server_tp = server_tp
        self._deadline_s = deadline_s
        self._address = address
        self._backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.name = f"exprl-weights-{uuid.uuid4().hex[:8]}"
        self._group: dist.ProcessGroup | None = None

    async def push(self, buckets: Iterable[Bucket], version: str) -> None:
        if self._group is None:
            await self._open()
        await self._all(client.begin_weight_update() for client in self._clients)
        for bucket, last in with_last(buckets):
            await self._send(bucket, version if last else None)
        await self._all(client.end_weight_update() for client in self._clients)

    async def close(self) -> None:
        if self._group is not None:
            await self._all(client.destroy_weights_group(self.name) for client in self._clients)
            dist.destroy_process_group(self._group)
            self._group = None

    async def _open(self) -> None:
        """All servers and this process meet in one new group."""
        (port,) = free_ports(1)
        world_size = 1 + self._server_tp * len(self._clients)
        joining = [
            client.init_weights_group(
                master_address=self._address,
                master_port=port,
                rank_offset=1 + i * self._server_tp,
                world_size=world_size,
                group=self.name,
                backend=self._backend,
                deadline_s=self._deadline_s,
            )
            for i, client in enumerate(self._clients)
        ]
        replies = asyncio.gather(*joining)
        meeting = asyncio.get_running_loop().run_in_executor(None, self._join, port, world_size)
        # A refusal ends the wait: the thread then gives up by the store's own timeout.
        done, _ = await asyncio.wait({replies, meeting}, return_when=asyncio.FIRST_EXCEPTION)
        for future in done:
            future.result()
        self._group = meeting.result()

    def _join(self, port: int, world_size: int) -> dist.ProcessGroup:
        """SGLang's servers build their side with the same helper, so that the store's keys agree."""
        timeout = timedelta(seconds=self._deadline_s)
        store, rank, _ = next(rendezvous(f"tcp://{self._address}:{port}", 0, world_size, timeout=timeout))
        store.set_timeout(timeout)
        group, _ = _new_process_group_helper(
            world_size,
            rank,
            [],
            Backend(self._backend),
            PrefixStore(self.name, store),
            group_name=self.name,
            timeout=timeout,
        )
        _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
        return group

    async def _send(self, bucket: Bucket, version: str | None) -> None:
        """One bucket to all servers; `version` marks the last one."""
        described = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in bucket]
        names, dtypes, shapes = zip(*described, strict=True)
        replies = asyncio.gather(
            *(
                client.update_from_distributed(
                    names,
                    dtypes,
                    shapes,
                    group=self.name,
                    version=version,
                    flush_cache=version is not None,
                    deadline_s=self._deadline_s,
                )
                for client in self._clients
            )
        )
        tensors = [tensor.contiguous() for _, tensor in bucket]
        works = [dist.broadcast(tensor, 0, group=self._group, async_op=True) for tensor in tensors]
        try:
            await _until_sent(works, replies)
        except RuntimeError as error:
            # The connection broke: the server's own reply, or its absence, says why.
            await replies
            names = ", ".join(client.name for client in self._clients)
            raise ServerError(f"The weight broadcast to {names} broke: {error}.") from error
        await replies

    async def _all(self, calls: Iterable) -> None:
        await asyncio.gather(*calls)


async def _until_sent(works: Sequence[dist.Work], replies: asyncio.Future) -> None:
    """Return when all tensors are sent; raise at once what a server replies that refuses to take them."""
    while not all(work.is_completed() for work in works):
        if replies.done():
            replies.result()
        await asyncio.sleep(_POLL_S)
    for work in works:
        work.wait()
