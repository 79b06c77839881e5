"""Run by syncs.py in the trainer's processes: syncs by each transport, to servers that never come and that die."""

import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from helpers.ranks import Ranks

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.config.transport import TransportChoice
from exprl_megatron.errors import ServerError
from exprl_megatron.policy.policy import Policy
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keys import authorization
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import WeightSync
from exprl_megatron.weight_sync.transports import make_transport
from on_device.servers import freeze

ABSENT = "absent"
BUCKET_MB = 0.25
KILL_AFTER_S = 1.0
PATIENCE = 12
"""Times the deadline of the server that never comes: what a server that does come has, on a loaded machine too."""


class Succession(StaticPool):
    """One server at a time: the next takes the place of one that a sync failed at."""

    def __init__(self, clients: list[SGLangClient]):
        super().__init__(clients[:1])
        self._next = clients[1:]
        self.failures: list[dict] = []
        """Why each failed, and how long after the start of the sync."""
        self.began = 0.0

    async def prepare(self, version: str) -> bool:
        self.began = time.monotonic()
        return await super().prepare(version)

    async def abort(self, error: ServerError) -> None:
        if not self._next:
            raise error
        self.failures.append({"error": str(error), "seconds": time.monotonic() - self.began})
        self.clients = [self._next.pop(0)]


@contextmanager
def absent():
    """The URL of what takes connections and never answers: a server that hangs before it joins any group."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def _limit_waits(client: SGLangClient, deadline_s: float) -> None:
    """Every request of the client has this deadline, whichever it is given."""
    exchange = client._exchange

    async def sooner(method, path, body, _, *more):
        return await exchange(method, path, body, deadline_s, *more)

    client._exchange = sooner


def change(policy: Policy) -> None:
    """Other weights than the last sync sent, the same on all ranks that hold a copy."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.neg_()


def kill_during_sync(pid: int) -> None:
    """The server of this supervisor does nothing from now on, and is dead a moment later."""
    processes = freeze(pid)

    def kill() -> None:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)

    threading.Timer(KILL_AFTER_S, kill).start()


class Trainer:
    """A rank's policy and its way to `servers` (names and URLs), one after the other, by the transport `kind`."""

    def __init__(self, world, arguments: dict, kind: str, servers: list[dict]):
        deadline_s, model = PATIENCE * arguments["deadline_s"], Path(arguments["model"])
        precision = PrecisionConfig(kind=arguments["precision"])
        self.policy = Policy(PolicyConfig(model=str(model), layout=world.layout, precision=precision), seed=0)
        self.coordinator = RankCoordinator(4 * deadline_s)
        self.clients = [
            SGLangClient(one["url"], one["name"], deadline_s=deadline_s, headers=authorization(one.get("key_file")))
            for one in servers
        ]
        for client in self.clients:
            self.coordinator.run(client.__aenter__())
            if client.name == ABSENT:
                _limit_waits(client, arguments["deadline_s"])
        self.members, choice = Succession(self.clients), TransportChoice(kind, "the test names it")
        transport = make_transport(choice, [], 1, world, self.coordinator, deadline_s, directory=model, model=model)
        config = SyncConfig(transport=kind, bucket_mb=BUCKET_MB, deadline_s=deadline_s)
        self.sync = WeightSync(config, self.policy, self.coordinator, self.members, transport, 1)

    def version(self) -> str:
        """What the server that is left says that it holds; rank 0 only."""
        (client,) = self.members.clients
        return self.coordinator.run(client.info())["weight_version"]

    def close(self) -> None:
        self.sync.close()
        for client in self.clients:
            self.coordinator.run(client.__aexit__())
        self.coordinator.close()


def succession(world, arguments: dict, kind: str) -> dict:
    """Three syncs by the transport `kind`: the first server never comes, the second dies in the third sync.

    Each is verified by checksums and raises where they differ.
    """
    dying, last = arguments["servers"][kind]
    with absent() as nowhere:
        servers = [{"name": ABSENT, "url": nowhere}, dying, last] if world.rank == 0 else []
        trainer = Trainer(world, arguments, kind, servers)
        metrics = []
        for number in (1, 2, 3):
            change(trainer.policy)
            if number == 3 and servers:
                kill_during_sync(dying["pid"])
            metrics.append(trainer.sync.push_weights(f"{kind}-{number}"))
        found = {"metrics": metrics, "failures": trainer.members.failures}
        if servers:
            found["version"] = trainer.version()
        trainer.close()
    return found


def main() -> None:
    ranks = Ranks()
    layout = Layout(**ranks.arguments["layout"])
    for kind in ranks.arguments["servers"]:
        ranks.within(layout, lambda world, kind=kind: succession(world, ranks.arguments, kind), kind)
    ranks.finish()


if __name__ == "__main__":
    main()
