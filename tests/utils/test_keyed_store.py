"""Stores through which processes meet: where they listen, and what of them is believed."""

import gc

import psutil
import pytest
import torch.distributed as dist

from exprl_megatron.utils.authentication import NotAuthentic, hidden_name, sign, verify
from exprl_megatron.utils.keyed_store import Records, connect_store, keyed_names, start_store

HOST = "127.77.1.2"
"""An address at which nobody else listens or connects, so that a port that was released is free."""


def listening() -> set[tuple[str, int]]:
    return {c.laddr[:2] for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_a_store_listens_at_its_address_alone_and_no_longer_when_it_is_let_go_of():
    before = listening()
    store = start_store(HOST, 0, 10.0)
    assert listening() - before == {(HOST, store.port)}
    other = connect_store(HOST, store.port, 10.0)
    other.set("name", "value")
    assert store.get("name") == b"value"
    port = store.port
    del store, other
    gc.collect()
    assert (HOST, port) not in listening()
    again = start_store(HOST, port, 10.0)
    assert again.port == port


def test_a_port_in_use_is_an_os_error():
    store = start_store("127.0.0.1", 0, 10.0)
    with pytest.raises(OSError, match="in use"):
        start_store("127.0.0.1", store.port, 10.0)


@pytest.fixture(scope="module")
def store():
    return start_store("127.0.0.1", 0, 10.0)


def test_a_record_is_read_by_who_has_the_key(store):
    Records(store, "key", "a purpose").set("record", bytes(range(256)))
    outside = connect_store("127.0.0.1", store.port, 10.0)
    reader = Records(outside, "key", "a purpose")
    assert reader.has("record") and reader.get("record") == bytes(range(256))
    for key, purpose in (("another", "a purpose"), ("key", "another purpose")):
        assert not Records(outside, key, purpose).check(["record"])


@pytest.mark.parametrize("forged", [b"", b"{", b"\xff" * 31, b"\0" * 32 + b"text", "moved", "another purpose"])
def test_a_record_that_a_client_without_the_key_wrote_is_not_believed(store, forged):
    records = Records(store, "key", "forged")
    records.set("record", "true")
    records.set("elsewhere", "false")
    outside = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    # Every client that can connect can list names.
    (name,) = (name for name in outside.list_keys() if name == f"{hidden_name('key', 'forged')}/record")
    if forged == "moved":
        forged = outside.get(name.replace("record", "elsewhere"))
    elif forged == "another purpose":
        forged = sign("key", "another: record", b"false")
    outside.set(name, forged)
    assert not records.has("record") and records.check(["record"])
    with pytest.raises(NotAuthentic, match="'forged: record' was written without this run's key"):
        records.get("record")


def test_names_are_hidden_from_who_has_not_the_key(store):
    keyed_names(store, "key", "ranks").set("address", "here")
    outside = connect_store("127.0.0.1", store.port, 10.0)
    for key in (None, "", "another"):
        assert not keyed_names(outside, key, "ranks").check(["address"])
    assert keyed_names(outside, "key", "ranks").get("address") == b"here"


@pytest.mark.parametrize("change", [0, 31, 32, -1])
def test_one_flipped_bit_anywhere_is_noticed(change):
    signed = bytearray(sign("key", "purpose", b"text"))
    assert bytes(verify("key", "purpose", signed)) == b"text"
    signed[change] ^= 1
    with pytest.raises(NotAuthentic):
        verify("key", "purpose", signed)
