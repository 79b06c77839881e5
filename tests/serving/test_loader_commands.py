"""Which commands a server's weight loader carries out: those of the run's key, once, and no others."""

import asyncio
import base64
import contextlib
import json
import pickle
import socket
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.loader_commands import LOADER, CommandGate, CommandNumbers, CommandRefused, signed
from exprl_megatron.serving.model_checksums import checksums, pack_expected
from exprl_megatron.serving.server_command import CPU_BACKEND
from exprl_megatron.serving.transfer_tables import MESSAGE, RECTANGLE, RankTransfers

START = 41
STOOD_IN = ("torchvision", "sgl_kernel")


@pytest.fixture(scope="module")
def loader():
    """The module that runs in a server, imported with the CPU backend, as in a server without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        # At the end: what is installed comes first.
        patch.setattr(sys, "path", [*sys.path, str(CPU_BACKEND)])
        from exprl_megatron.serving import loader
    for name in [name for name in sys.modules if name.partition(".")[0] in STOOD_IN]:
        if (sys.modules[name].__file__ or "").startswith(str(CPU_BACKEND)):
            del sys.modules[name]
    return loader


ORDER = {"do": "join", "address": "10.0.0.1", "port": 2000, "group": "weights-1", "rank": 3, "deadline_s": 60.0}


def test_an_order_with_the_key_s_code_is_read_as_it_was_given():
    gate = CommandGate("key", START)
    for number in (5, 6, 900):
        assert gate.admit(signed(ORDER, "key", START, number)) == ORDER | {"start": START, "number": number}


@pytest.mark.parametrize("field", [*ORDER, "start", "number"])
def test_an_order_of_which_any_field_was_changed_is_refused(field):
    code, _, text = signed(ORDER, "key", START, 7).partition(" ")
    command = json.loads(text)
    command[field] = "127.0.0.1" if isinstance(command[field], str) else command[field] + 1
    with pytest.raises(CommandRefused, match="no authentication code of this server's key"):
        CommandGate("key", START).admit(f"{code} {json.dumps(command)}")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ORDER),
        "",
        " ",
        f" {json.dumps(ORDER)}",
        f"{'0' * 64} {json.dumps(ORDER)}",
        f"{'é' * 64} {json.dumps(ORDER)}",
        "model.norm.weight",
        signed(ORDER, "another key", START, 7),
        signed(ORDER, "", START, 7),
        signed(ORDER, "key", START, 7)[:-1],
        signed(ORDER, "key", START, 7)[:62] + signed(ORDER, "key", START, 7)[64:],
    ],
)
def test_an_order_without_the_key_s_code_is_refused(text):
    with pytest.raises(CommandRefused, match="no authentication code of this server's key"):
        CommandGate("key", START).admit(text)


def test_an_order_is_carried_out_once_and_none_that_is_older_than_another():
    gate = CommandGate("key", START)
    first, second = (signed(ORDER, "key", START, number) for number in (7, 8))
    gate.admit(second)
    for seen in (second, first):
        with pytest.raises(CommandRefused, match="was executed before"):
            gate.admit(seen)


def test_an_order_for_the_server_before_it_was_started_again_is_refused():
    seen = signed(ORDER, "key", START, 7)
    CommandGate("key", START).admit(seen)
    with pytest.raises(CommandRefused, match="another start"):
        CommandGate("key", START + 1).admit(seen)


@pytest.mark.parametrize("key", [None, ""])
def test_a_server_without_a_key_takes_no_orders(key):
    with pytest.raises(CommandRefused, match="has no key"):
        CommandGate(key, START).admit(signed(ORDER, "", START, 7))


def test_numbers_rise_also_where_the_clock_goes_back(monkeypatch):
    times = iter([100, 100, 50, 200])
    monkeypatch.setattr("time.time_ns", lambda: next(times))
    numbers = CommandNumbers()
    assert [numbers.next() for _ in range(4)] == [100, 101, 102, 200]


def test_the_loader_connects_to_nobody_whose_command_lacks_the_code(monkeypatch, loader):
    """What an attacker did who could reach `/update_weights_from_tensor`: a listener of their own in an command."""
    monkeypatch.setattr(loader, "_gate", CommandGate("key", START), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = {**ORDER, "address": "127.0.0.1", "port": port, "answer": "a", "deadline_s": 0.5, "secret": "s"}
        for text in (json.dumps(command), signed(command, "guessed", START, 7)):
            loader.load(torch.nn.Linear(1, 1), [(text, torch.empty(0))])
        listener.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            listener.accept()


class InProcess(SGLangClient):
    """A client whose server is `model` here: what is posted for the loader is given to it."""

    def __init__(self, model: torch.nn.Module, load):
        super().__init__("http://127.0.0.1:9", "policy-0", headers={"Authorization": "Bearer key"})
        self._model, self._load = model, load

    async def _request(self, method, path, body, deadline_s, limit=0):
        if path == "/server_info":
            return {"random_seed": START, "custom_weight_loader": [LOADER]}
        for packed in (body or {}).get("serialized_named_tensors", ()):
            ((text, tensor),) = pickle.loads(base64.b64decode(packed))
            await asyncio.to_thread(self._load, self._model, [(text, tensor)])
        return {"success": True}


@pytest.mark.parametrize("key", ["key", "another"])
def test_trainer_and_server_agree_on_checksums_through_orders_of_one_key(monkeypatch, loader, key):
    from exprl_megatron.weight_sync.shard_checksums import ShardChecksums

    monkeypatch.setattr(loader, "_gate", CommandGate(key, START))
    model = torch.nn.Linear(3, 2, bias=False)
    parts = np.array([(0, 0, 2, 0, 3)], dtype=RECTANGLE)
    planned = Future()
    planned.set_result(
        SimpleNamespace(servers=[SimpleNamespace(shapes={"weight": (2, 3)})], parts=[parts], sigmoid_router=False)
    )
    sums = ShardChecksums(None, None, 1, 10.0)
    sums._planning = planned
    held = sums.held([InProcess(model, loader.load)], torch.float32)
    if key == "another":
        with pytest.raises(ServerError, match="did not report its weights' checksums: it did not answer"):
            asyncio.run(held)
        return
    ((found,),) = asyncio.run(held)
    assert found == checksums({"weight": model.weight}, pack_expected({"weight": (2, 3)}, ["float32"], parts))
    # A second time: what was expected is remembered.
    assert asyncio.run(sums.held([InProcess(model, loader.load)], torch.float32)) == [(found,)]


def test_after_a_direct_sync_norms_with_1_added_are_those_of_the_new_weights(monkeypatch, loader):
    """SGLang has a second copy of them, which kernels on CUDA read and its own loader alone brings up to date."""
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    model = torch.nn.Sequential(GemmaRMSNorm(3), torch.nn.Linear(3, 3))
    monkeypatch.setattr(loader, "run_rounds", lambda *_: model[0].weight.data.copy_(torch.tensor([1.0, 2.0, -3.0])))
    member = object.__new__(loader._Member)
    member._model, member._places, member._dtype, member._device = model, [], torch.float32, torch.device("cpu")
    member._transfers = RankTransfers(np.empty(0, MESSAGE), np.empty(0, RECTANGLE))
    member._while_wanted = contextlib.nullcontext
    kept = model[0].gemma_weight.data_ptr()
    member.receive()
    assert model[0].gemma_weight.tolist() == [2.0, 3.0, -2.0] and model[0].gemma_weight.data_ptr() == kept
    assert "0.gemma_weight" in loader._compared(model)
