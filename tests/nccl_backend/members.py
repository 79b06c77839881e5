"""Run by test_nccl_backend.py: `members.py OUT` plays each scenario with forked members and keeps their words.

A scenario is a function of a Member; what it returns, or the error that it raises, is that member's word. A member that
has not ended after DEADLINE_S (HANGS_S where it is to hang) has the word "hangs".
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from nccl_like.records import PATIENCE, Hang
from remote_server import CONTROL, WORLD, Asker, exporter, serve

from exprl_megatron.policy.gloo_group import broadcast_from_rank, gather_from_all_ranks
from exprl_megatron.serving.process_groups import GroupThread, destroy
from exprl_megatron.weight_sync.broadcast import BroadcastTransport
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.groups import abort_group, broadcast
from exprl_megatron.weight_sync.timing import SyncTimes

DEADLINE_S = 90.0
HANGS_S = 9.0
"""Longer than TIMEOUT."""
TIMEOUT = timedelta(seconds=4)
"""Of the groups in which a member is missing; those of the others do not end within the test."""


class Member:
    """A process of a default group over gloo, in which it makes groups of the backend."""

    def __init__(self, rank: int, size: int, port: int):
        self.rank, self.size, self._port = rank, size, port
        dist.init_process_group("gloo", store=self.store("first"), rank=rank, world_size=size)
        self._events = self.store("events")

    def store(self, name: str) -> dist.Store:
        return dist.PrefixStore(name, dist.TCPStore("127.0.0.1", self._port, is_master=False))

    def group(self, timeout: timedelta = timedelta(seconds=2 * DEADLINE_S)) -> dist.ProcessGroup:
        return dist.new_group(backend="nccl_like", timeout=timeout)

    def say(self, event: str) -> None:
        """Other members can see, and wait for, what has happened: a clock says little on a loaded machine."""
        self._events.set(event, "")

    def said(self, *events: str) -> bool:
        return self._events.check(list(events))

    def wait_for(self, *events: str) -> None:
        self._events.wait(list(events), timedelta(seconds=DEADLINE_S))

    def init_group(self) -> None:
        """Wait for the others, without the backend."""
        dist.barrier()

    @property
    def first(self) -> bool:
        return self.rank == 0


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def values(m: Member) -> list:
    """What collectives, batches and single sends bring."""
    group, tensor = m.group(), torch.full((2,), float(m.rank))
    summed = tensor.clone()
    dist.all_reduce(summed, group=group)
    gathered = [torch.zeros(2) for _ in range(m.size)]
    dist.all_gather(gathered, tensor, group=group)
    around = torch.zeros(2)
    there, back = (m.rank + 1) % m.size, (m.rank - 1) % m.size
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=there),
            dist.P2POp(dist.irecv, around, group=group, group_peer=back),
        ]
    )
    for work in works:
        work.wait()
    alone = tensor.clone()
    if m.rank < 2:
        (dist.send if m.first else dist.recv)(alone, 1 - m.rank, group=group)
    root = torch.full((2,), float(m.rank))
    dist.broadcast(root, 2, group=group)
    dist.destroy_process_group(group)
    return [summed.tolist(), [one.tolist() for one in gathered], around.tolist(), alone.tolist(), root.tolist()]


def first_operation(m: Member) -> bool:
    """Whether rank 1, which is late, had come when an asynchronous first operation gave its caller back.

    To the second one rank 1 comes when the others have theirs back.
    """
    group, tensor = m.group(), torch.zeros(1)
    m.init_group()
    if m.rank == 1:
        time.sleep(2.0)
        m.say("comes")
    work = dist.all_reduce(tensor, group=group, async_op=True)
    came = m.said("comes")
    work.wait()
    if m.rank == 1:
        m.wait_for("0 is back", "2 is back")
    work = dist.all_reduce(tensor, group=group, async_op=True)
    m.say(f"{m.rank} is back")
    work.wait()
    return came


def first_operation_of_a_pair(m: Member) -> bool:
    """The same for a first send to a rank of a group that is connected."""
    group = m.group()
    dist.all_reduce(torch.zeros(1), group=group)
    if m.first:
        dist.isend(torch.zeros(1), 1, group=group).wait()
        return m.said("comes")
    time.sleep(2.0)
    m.say("comes")
    dist.recv(torch.zeros(1), 0, group=group)
    return True


def first_operation_without_end(m: Member) -> None:
    """Rank 1 never comes, and the group's timeout is over long before HANGS_S."""
    group = m.group(TIMEOUT)
    if m.rank != 1:
        dist.all_reduce(torch.zeros(1), group=group)
    else:
        time.sleep(DEADLINE_S)


def first_operation_reported(m: Member) -> str:
    """Rank 1 never comes, and there is a bound to patience."""
    os.environ[PATIENCE] = "3"
    group = m.group()
    if m.rank == 1:
        return ""
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except Hang as hang:
        return str(hang)
    return "went on"


def another_order(m: Member) -> None:
    group, tensor = m.group(), torch.zeros(2)
    calls = [lambda: dist.all_reduce(tensor, group=group), lambda: dist.broadcast(tensor, 0, group=group)]
    for call in calls if m.first else calls[::-1]:
        call()


def another_size(m: Member) -> None:
    dist.all_reduce(torch.zeros(3 if m.first else 2), group=m.group())


def another_dtype(m: Member) -> None:
    dist.all_reduce(torch.zeros(2, dtype=torch.int32 if m.first else torch.float32), group=m.group())


def another_root(m: Member) -> None:
    dist.broadcast(torch.zeros(2), 0 if m.first else 1, group=m.group())


def both_send(m: Member) -> None:
    """Ranks 0 and 1."""
    group = m.group()
    if m.rank < 2:
        dist.send(torch.zeros(2), 1 - m.rank, group=group)


def another_size_in_a_batch(m: Member) -> None:
    """Rank 1 expects more than rank 0 sends."""
    group = m.group()
    dist.all_reduce(torch.zeros(1), group=group)
    if m.rank < 2:
        kind = dist.isend if m.first else dist.irecv
        tensor = torch.zeros(2 + m.rank)
        works = dist.batch_isend_irecv([dist.P2POp(kind, tensor, group=group, group_peer=1 - m.rank)])
        if m.first:
            # Its own operation has no end.
            m.wait_for("reported")
            return
        try:
            for work in works:
                work.wait()
        finally:
            m.say("reported")


def in_order(m: Member) -> list[bool]:
    """Rank 0 is late: which of the other's two later operations are done before it comes."""
    group, tensor = m.group(), torch.zeros(1)
    dist.all_reduce(tensor, group=group)
    if m.first:
        m.wait_for("looked")
    works = [dist.broadcast(tensor, 0, group=group, async_op=True), dist.all_reduce(tensor, group=group, async_op=True)]
    time.sleep(0.3)
    done = [work.is_completed() for work in works]
    m.say("looked")
    for work in works:
        work.wait()
    return done


def same_device(m: Member) -> None:
    os.environ["NCCL_LIKE_DEVICE"] = f"cuda:{min(m.rank, 1)}"
    dist.all_reduce(torch.zeros(1), group=m.group())


def destroyed_with_work(m: Member) -> str:
    """Rank 0 destroys while an operation is in flight that rank 1 never enters; another thread aborts 2 s later."""
    group = m.group()
    dist.all_reduce(torch.zeros(1), group=group)
    if m.rank == 1:
        m.wait_for("destroyed")
        return "stayed away"
    work = dist.all_reduce(torch.zeros(1), group=group, async_op=True)
    aborts = threading.Event()
    threading.Timer(2.0, lambda: (aborts.set(), group.abort())).start()
    dist.destroy_process_group(group)
    waited = aborts.is_set()
    m.say("destroyed")
    try:
        work.wait()
    except RuntimeError as error:
        return f"{waited}: {error}"
    return "went on"


def destroyed_side_by_side(m: Member) -> bool:
    """Rank 1 is late to destroy a group in which nothing is in flight: whether rank 0 waited for it."""
    group = m.group()
    dist.all_reduce(torch.zeros(1), group=group)
    if m.rank == 1:
        time.sleep(2.0)
        m.say("comes")
    dist.destroy_process_group(group)
    return m.said("comes")


def broken_member(m: Member) -> str:
    """Rank 1 aborts; the others' operation is neither done nor failed until they time out (0) or abort (2)."""
    group = m.group(TIMEOUT)
    dist.all_reduce(torch.zeros(1), group=group)
    if m.rank == 1:
        group.abort()
        return "aborted"
    work = dist.all_reduce(torch.zeros(1), group=group, async_op=True)
    time.sleep(1.5)
    before = work.is_completed()
    if m.rank == 2:
        group.abort()
    try:
        took_s = seconds(work.wait)
    except RuntimeError as error:
        return f"{before}: {error}"
    return f"{before}: done in {took_s} s"


def dead_member(m: Member) -> str:
    """Rank 1 dies with an operation in flight; the others time out."""
    group = m.group(TIMEOUT)
    dist.all_reduce(torch.zeros(1), group=group)
    if m.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        return str(error)
    return "went on"


def objects(m: Member) -> list:
    """Objects over a group of the backend, and over one of gloo."""
    group, plain = m.group(), dist.new_group(backend="gloo")
    box = [{"from": m.rank}]
    dist.broadcast_object_list(box, 0, group=group)
    dist.broadcast_object_list(box, 0, group=plain)
    gathered = [None] * m.size
    dist.all_gather_object(gathered, m.rank, group=group)
    return [box, gathered]


def product_breaks_off(m: Member) -> float:
    """Rank 0 gives a group up in which an operation is in flight that rank 1 never enters; then both form another."""
    group = m.group()
    dist.all_reduce(torch.zeros(1), group=group)
    if m.rank == 1:
        m.wait_for("given up")
        group.abort()
    else:
        work = dist.all_reduce(torch.zeros(1), group=group, async_op=True)
        abort_group(group, m.rank, m.size)
        m.say("given up")
        assert work.is_completed() and not work.is_success()
        assert group not in dist.distributed_c10d._world.pg_map
    m.init_group()
    again = torch.ones(1)
    dist.all_reduce(again, group=m.group())
    return again.item()


def product_leaves_what_does_not_connect(m: Member) -> float:
    """The same where rank 1 never comes to the first operation: the thread that is in it is left behind."""
    group = m.group()
    if m.first:
        thread = GroupThread("weights")
        thread.submit(lambda: broadcast(group, torch.zeros(1)))
        time.sleep(0.5)
        abort_group(group, m.rank, m.size)
    m.init_group()
    again = torch.ones(1)
    dist.all_reduce(again, group=m.group())
    return again.item()


def product_destroys(m: Member) -> list:
    """Nothing is in flight; rank 1 is late, and in the second group comes when rank 0 no longer waits for it.

    Whether rank 0 waited for it in the first group, and how many seconds in the second.
    """
    together, alone = m.group(), m.group()
    dist.all_reduce(torch.zeros(1), group=together)
    if not m.first:
        time.sleep(1.0)
        m.say("comes")
    destroy(together, DEADLINE_S)
    waited = m.said("comes")
    dist.all_reduce(torch.zeros(1), group=alone)
    if not m.first:
        m.wait_for("given up")
    alone_s = seconds(lambda: destroy(alone, 2.0))
    m.say("given up")
    return [waited, alone_s]


def product_objects(m: Member) -> list:
    """All ways in which ranks exchange objects, where the default group goes over the backend."""
    dist.destroy_process_group()
    dist.init_process_group("nccl_like", store=m.store("again"), rank=m.rank, world_size=m.size)
    dist.all_reduce(torch.zeros(1))
    coordinator = RankCoordinator(DEADLINE_S)
    everywhere = coordinator.broadcast_from_rank0(lambda: {"only": "rank 0"})
    coordinator.signal("go") if m.first else coordinator.wait_signal()
    collected = coordinator.collect(m.rank)
    shared = [broadcast_from_rank(1, m.rank), gather_from_all_ranks(m.rank)]
    coordinator.close()
    return [everywhere, collected, shared]


def product_broadcasts(m: Member) -> list:
    """Two syncs by broadcast to a server that receives when it is asked to."""
    if not m.first:
        return serve()
    server = Asker()
    transport = BroadcastTransport([server], 1, WORLD, CONTROL, DEADLINE_S)

    async def sync() -> None:
        await transport.push(exporter(3), "v1", SyncTimes())
        await transport.push(exporter(2), "v2", SyncTimes())
        await transport.close()
        await server.end()

    asyncio.run(sync())
    return []


SCENARIOS: dict[Callable[[Member], object], int] = {
    values: 3,
    first_operation: 3,
    first_operation_of_a_pair: 2,
    first_operation_without_end: 3,
    first_operation_reported: 3,
    another_order: 3,
    another_size: 3,
    another_dtype: 2,
    another_root: 2,
    both_send: 2,
    another_size_in_a_batch: 2,
    in_order: 2,
    same_device: 3,
    destroyed_with_work: 2,
    destroyed_side_by_side: 2,
    broken_member: 3,
    dead_member: 2,
    objects: 2,
    product_breaks_off: 2,
    product_leaves_what_does_not_connect: 2,
    product_destroys: 2,
    product_objects: 2,
    product_broadcasts: 2,
}
"""With how many members each is played."""


def fork(scenario: Callable[[Member], object], rank: int, size: int, port: int, out: Path) -> int:
    """Start a member; its process id."""
    if child := os.fork():
        return child
    records = out / scenario.__name__
    os.environ |= {"NCCL_LIKE_RECORDS": str(records), "EXPRL_GROUP_BACKEND": "nccl_like"}
    try:
        word = scenario(Member(rank, size, port))
    except Exception as error:
        word = f"{type(error).__name__}: {error}"
    (records / f"word.{rank}").write_text(json.dumps(word))
    os._exit(0)


def watch(children: list[int], deadline_s: float) -> None:
    """Until all have ended; who has not after `deadline_s` is killed."""
    until = time.monotonic() + deadline_s
    for child in children:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)


def main(out: Path) -> None:
    """Play all scenarios, side by side."""
    from exprl_megatron.utils.ports import free_ports

    ports = free_ports(len(SCENARIOS))
    # All members are forked before there are threads.
    playing = []
    for (scenario, size), port in zip(SCENARIOS.items(), ports, strict=True):
        (out / scenario.__name__).mkdir(parents=True)
        playing.append((scenario, [fork(scenario, rank, size, port, out) for rank in range(size)]))
    stores = [dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) for port in ports]
    with ThreadPoolExecutor(len(playing)) as pool:
        bounds = [HANGS_S if scenario is first_operation_without_end else DEADLINE_S for scenario, _ in playing]
        list(pool.map(watch, [children for _, children in playing], bounds))
    words = {}
    for scenario, size in SCENARIOS.items():
        files = [out / scenario.__name__ / f"word.{rank}" for rank in range(size)]
        words[scenario.__name__] = [json.loads(file.read_text()) if file.exists() else "hangs" for file in files]
    (out / "words.json").write_text(json.dumps(words))
    del stores


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)
