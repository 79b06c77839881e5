"""Which trainer rank hands memory to which rank of a server, and how a message gets to all of them."""

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.weight_sync.handles import HandlesTransport, _chains


@pytest.fixture(autouse=True)
def hosts(monkeypatch):
    monkeypatch.setattr("exprl_megatron.weight_sync.handles.is_local_host", lambda host: host == HERE)


HERE, THERE = "10.0.0.1", "10.0.0.2"


class Leader:
    """Rank 0 of the ranks whose places `seen` has."""

    is_rank0 = True

    def __init__(self, seen):
        self._seen = seen
        self.said = []

    def signal(self, payload=None):
        self.said.append(payload)

    def collect(self, item):
        return self._seen

    def abort_on_error(self):
        return pytest.MonkeyPatch.context()


class Follower:
    """Another rank, which hears what rank 0 said."""

    is_rank0 = False

    def __init__(self, said):
        self._said = list(said)

    def wait_signal(self):
        return self._said.pop(0)

    def collect(self, item):
        return None


def transport(seen, *servers, tp):
    clients = []
    for number, (host, gpu) in enumerate(servers):
        client = SGLangClient(f"http://{host}:1", f"policy-{number}")
        client.first_gpu = gpu
        clients.append(client)
    coordinator = Leader(seen)
    made = HandlesTransport(clients, tp, None, coordinator, 1.0)
    other = HandlesTransport([], tp, None, Follower(coordinator.said), 1.0)
    assert (other._sources, other.source_ranks) == (made._sources, made.source_ranks), "all ranks must fill the same"
    return made._sources, made.source_ranks


EIGHT = [({HERE}, gpu) for gpu in range(4)] + [({THERE}, gpu) for gpu in range(4)]


def test_each_rank_of_a_server_has_a_source_on_its_own_gpu():
    sources, chains = transport(EIGHT, (HERE, 0), (HERE, 2), (THERE, 2), tp=2)
    assert sources == [[0, 1], [2, 3], [6, 7]]
    assert chains == ((0, 1, 2, 3), (6, 7)), "a message is gathered once on each machine"


def test_ranks_are_found_by_their_gpu_and_not_by_their_order():
    sources, _ = transport([({HERE}, gpu) for gpu in (3, 1, 2, 0)], (HERE, 0), tp=4)
    assert sources == [[3, 1, 2, 0]]


def test_servers_on_gpus_without_a_trainer_rank_share_the_ranks_of_their_machine():
    sources, chains = transport([({HERE}, gpu) for gpu in range(2)], (HERE, 2), tp=4)
    assert sources == [[0, 1, 0, 1]] and chains == ((0, 1),)


def test_a_machine_without_a_trainer_rank_is_named():
    with pytest.raises(UserError, match=r"no trainer rank runs on 10.0.0.2, where policy-1 is"):
        transport([({HERE}, 0)], (HERE, 0), (THERE, 0), tp=1)


def test_a_machine_with_two_names_has_each_rank_once():
    assert _chains(["a", "b", "c"], [[0, 1], [1, 2], [0]]) == ((0, 1), (2,))
