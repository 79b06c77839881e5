"""Objects between ranks: what a peer without the run's key sends is refused before it is unpickled."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from exprl_megatron.errors import RunStopped
from exprl_megatron.policy import signed_objects
from exprl_megatron.policy.signed_objects import broadcast_object, gather_objects, receive_object, use_key
from exprl_megatron.utils.keyed_store import start_store

STRANGER = """
import pickle, sys
import torch, torch.distributed as dist
from datetime import timedelta

class Command:
    def __reduce__(self):
        import os
        return os.system, (f"id > {sys.argv[2]}",)

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=120))
# A pickle, and one behind a wrong code.
for before in (b"", b"0" * 32):
    data = torch.frombuffer(bytearray(before + pickle.dumps(Command())), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    # As gather_objects, receive_object and broadcast_object expect them.
    dist.all_gather_single(torch.empty(2, dtype=torch.int64), size)
    dist.gather(data, dst=0)
    dist.send(size, 0)
    dist.send(data, 0)
    dist.broadcast(size, 1)
    dist.broadcast(data, 1)
dist.destroy_process_group()
"""


@pytest.fixture
def key():
    use_key("the run's")
    yield
    use_key(None)


def test_nothing_that_a_peer_without_the_key_sends_is_unpickled(key, tmp_path):
    ran = tmp_path / "ran"
    store = start_store("127.0.0.1", 0, 60.0)
    command = [sys.executable, "-W", "ignore", "-c", STRANGER, str(store.port), str(ran)]
    stranger = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    dist.init_process_group("gloo", store=store, rank=0, world_size=2)
    try:
        for receive in 2 * (
            lambda group: gather_objects("item", 0, group),
            lambda group: receive_object(1, group),
            lambda group: broadcast_object(None, 1, group),
        ):
            with pytest.raises(
                RunStopped, match=r"^A trainer process refuses a message of another one: '.*' was written without"
            ):
                receive(dist.group.WORLD)
        assert stranger.wait(60) == 0
    finally:
        stranger.kill()
        stranger.wait()
        dist.destroy_process_group()
    assert not ran.exists()


@pytest.mark.parametrize("item", [None, {"rank": 1}, [b"\0" * 100_000], float("nan")])
def test_an_object_is_read_with_its_key_and_with_no_other_one(key, item):
    signed = signed_objects._signed(item)
    assert signed.dtype == torch.uint8
    assert repr(signed_objects._opened(signed)) == repr(item)
    assert pickle.loads(signed[32:].numpy().tobytes()) == item or item != item
    use_key("another")
    with pytest.raises(RunStopped):
        signed_objects._opened(signed)
